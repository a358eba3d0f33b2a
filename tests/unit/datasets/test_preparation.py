"""Datasets made from others, held-out sets, and where a row is: over a database and a store that outlive processes."""

import asyncio
import json
import re
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

import pytest

from lathe.common.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from lathe.datasets.model import AuditOptions, AuditState, DatasetState, blob_key, derived_name, index_key
from lathe.datasets.operations import AuditChoice, Dedupe, Drop, Parent, Sample, Split, from_json, to_json
from lathe.datasets.preparing import Preparing
from lathe.datasets.protos import trained_rows_pb
from lathe.text.rowindex import VERSION
from tests.fixtures.worlds import Died, DyingRows, DyingStore
from tests.unit.datasets.conftest import GOOD, jsonl, row, sha

ROWS = [row(f"Question {n}", f"Answer {n % 3}") for n in range(60)]
SIXTY = jsonl(ROWS)
SUPERVISED = AuditOptions()


async def audit(world, dataset, options=SUPERVISED, **asked):
    return await world.start().ensure_audit("acme", dataset.id, "baseModels/tiny", options, **asked)


async def settled_audit(world, dataset, options=SUPERVISED, **asked):
    found = await audit(world, dataset, options, **asked)
    for _ in range(3):
        if found.state is AuditState.RUNNING:
            await world.prepare()
            await world.audit()
            found = await audit(world, dataset, options, **asked)
    return found


# --- datasets made from others -----------------------------------------------------------------------------------


async def test_a_split_makes_two_datasets_that_say_where_they_come_from(world):
    parent = await world.ready(SIXTY)
    train, held_out = await world.derive(parent, Split(1, 0.25, stratify_by="answer"))
    assert (train.state, held_out.state) == (DatasetState.READY, DatasetState.READY)
    assert (train.report.example_count, held_out.report.example_count) == (45, 15)
    assert (train.display_name, held_out.display_name) == ("train.train.jsonl", "train.held_out.jsonl")
    assert train.preparation.parents == (Parent(parent.id, parent.sha256),)
    assert (train.preparation.part, held_out.preparation.part) == ("train", "held_out")
    lines = [await world.content(each) for each in (train, held_out)]
    assert sorted(b"".join(lines).splitlines()) == sorted(SIXTY.splitlines())
    answers = [json.loads(line)["messages"][1]["content"] for line in lines[1].splitlines()]
    assert sorted(map(answers.count, set(answers))) == [5, 5, 5]
    assert train.staging_key == held_out.staging_key == ""


@pytest.mark.parametrize("after", [False, True])
async def test_of_a_split_that_breaks_off_both_datasets_are_there_or_none(world, after):
    parent = await world.ready(SIXTY)
    await world.prepare()
    with pytest.raises(Died):
        store = DyingRows(world.store, "add_all", after=after)
        await world.preparation(store=store).prepare("acme", parent.id, Split(1, 0.25), "one")
    there = [each.preparation.part for each in await world.store.in_state(DatasetState.VALIDATING)]
    assert sorted(there) == (["held_out", "train"] if after else [])
    made = await world.preparation().prepare("acme", parent.id, Split(2, 0.5), "one")
    assert len(await world.store.in_state(DatasetState.VALIDATING)) == 2
    assert {each.dataset.preparation.operation for each in made} == {
        Split(1, 0.25) if after else Split(2, 0.5)
    }


@pytest.mark.parametrize("lost", [0, 1])
async def test_a_split_of_which_one_dataset_is_gone_is_ended_as_it_was_begun(world, service, lost):
    parent = await world.ready(SIXTY)
    await world.prepare()
    first = await world.preparation().prepare("acme", parent.id, Split(1, 0.25), "one")
    await service.delete("acme", first[lost].dataset.id)
    made = await world.preparation().prepare("acme", parent.id, Split(2, 0.5), "one")
    assert made[1 - lost] == first[1 - lost]
    await world.prepare()
    await world.validate()
    parts = [await world.start().get("acme", each.dataset.id) for each in made]
    assert [part.preparation.operation for part in parts] == [Split(1, 0.25)] * 2
    lines = [await world.content(part) for part in parts]
    assert sorted(b"".join(lines).splitlines()) == sorted(SIXTY.splitlines())


async def test_what_is_made_expires_when_its_parent_does(world, service):
    parent = await service.create(
        "acme", "a.jsonl", "fine-tune", world.clock.now() + timedelta(days=3), "", import_options=None
    )
    await world.objects.put(parent.staging_key, SIXTY)
    await service.commit_upload("acme", parent.id, parent.staging_key, len(SIXTY), sha(SIXTY))
    await world.validate()
    await world.prepare()
    for made in await world.derive(parent, Split(1, 0.25)):
        assert made.expire_time == parent.expire_time


def test_what_is_made_is_named_after_what_it_is_made_of():
    assert derived_name("tickets.CSV", "split", "held_out") == "tickets.held_out.jsonl"
    assert derived_name("v1.2", "dedupe", "") == "v1.2.dedupe.jsonl"
    assert derived_name(".jsonl", "dedupe", "") == ".jsonl.dedupe.jsonl"
    assert derived_name("x" * 255, "sample", "") == "sample.jsonl"


@pytest.mark.parametrize("other", [Dedupe(), Sample(1, 20), Split(1, 0.25)])
@pytest.mark.parametrize("first", [Dedupe(), Sample(1, 20), Split(1, 0.25)])
async def test_a_request_id_is_of_one_kind_of_operation(world, first, other):
    parent = await world.ready(SIXTY)
    await world.prepare()
    service = world.preparation()
    made = await service.prepare("acme", parent.id, first, "one")
    if first == other:
        assert await service.prepare("acme", parent.id, other, "one") == made
    else:
        with pytest.raises(InvalidArgument, match="request_id was used for another operation") as refused:
            await service.prepare("acme", parent.id, other, "one")
        assert refused.value.violations[0].field == "request_id"
    assert len(await world.store.in_state(DatasetState.VALIDATING)) == len(made)


@pytest.mark.parametrize("operation", [Sample(1, 20), Split(1, 0.25, stratify_by="answer")])
async def test_nothing_is_made_of_a_file_that_is_damaged(world, operation):
    parent = await world.ready(SIXTY)
    await world.prepare()
    await world.objects.put(blob_key(parent.sha256), SIXTY.replace(b"Answer 1", b"Answer 7"))
    for made in await world.derive(parent, operation):
        assert (made.state, made.report.findings[0].code) == (DatasetState.ERROR, "cannot_prepare")
        assert "damaged" in made.report.findings[0].message and not made.sha256


async def test_the_same_operation_gives_the_same_bytes_and_a_count_before(world):
    parent = await world.ready(SIXTY)
    await world.prepare()
    service = world.preparation()
    rows, counted = await service.count("acme", parent.id, Split(3, count=12))
    assert (rows, [each.rows for each in counted]) == (60, [48, 12])
    assert len(await world.store.training_files("acme")) == 1
    first, second = await world.derive(parent, Sample(3, 20)), await world.derive(parent, Sample(3, 20))
    assert first[0].sha256 == second[0].sha256 and first[0].id != second[0].id


async def test_rows_keep_their_bytes_and_only_line_ends_are_made_even(world):
    odd = b"\xef\xbb\xbf" + b"\r\n\n".join(json.dumps(item, indent=None).encode() for item in ROWS[:12])
    parent = await world.ready(odd + b"\n" + json.dumps(ROWS[0], separators=(",", ":")).encode())
    assert parent.state is DatasetState.READY
    (made,) = await world.derive(parent, Dedupe())
    assert await world.content(made) == jsonl(ROWS[:12])


async def test_a_dry_count_waits_for_the_index(world):
    parent = await world.ready(SIXTY)
    with pytest.raises(Unavailable, match="indexed") as error:
        await world.preparation().count("acme", parent.id, Dedupe())
    assert error.value.retry_after
    await world.prepare()
    assert (await world.preparation().count("acme", parent.id, Drop((1,))))[1][0].rows == 59


@pytest.mark.parametrize("left", [None, b"", b"ARROW1 but no more"])
async def test_an_index_that_is_lost_or_damaged_is_made_again(world, left):
    parent = await world.ready(SIXTY)
    await world.prepare()
    await world.objects.delete(index_key(parent.sha256))
    if left is not None:
        await world.objects.put(index_key(parent.sha256), left)
    with pytest.raises(Unavailable):
        await world.preparation().count("acme", parent.id, Dedupe())
    await world.prepare()
    assert (await world.preparation().count("acme", parent.id, Dedupe()))[0] == 60


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        (Sample(1, 61), "61 rows were asked for; the dataset has 60"),
        (Sample(1, 9), "9 rows would be left, and a dataset has at least 10"),
        (Split(1, count=60), "leaves nothing to train on"),
        (Split(1, count=9), "9 rows would be held out and 51 left to train on"),
        (Split(1, 0.9), "54 rows would be held out and 6 left to train on"),
        (Split(1, 0.5, stratify_by="messages[0"), "is no path"),
        (Drop(tuple(range(1, 52))), "9 rows would be left"),
    ],
)
async def test_what_so_few_rows_cannot_give_is_refused_before_anything_is_made(world, operation, words):
    parent = await world.ready(SIXTY)
    with pytest.raises(InvalidArgument, match=words):
        await world.preparation().prepare("acme", parent.id, operation, "")
    with pytest.raises(InvalidArgument, match=words):
        await world.preparation().count("acme", parent.id, operation)
    assert await world.store.unwritten() == []


TWICE = jsonl(ROWS[:8] * 4)


@pytest.mark.parametrize(
    ("content", "operation", "words"),
    [
        (SIXTY, Drop((61,)), "no row on line 61"),
        (SIXTY, Split(1, 0.5, stratify_by="mesages[0].content"), "no row has mesages[0].content"),
        (TWICE, Dedupe(), "8 rows would be left"),
        # Four equal rows stay together: two such sets fit into 11.
        (TWICE, Split(1, count=11), "8 rows would be held out and 24 left to train on"),
    ],
)
async def test_what_the_rows_cannot_give_is_an_error_of_all_that_was_to_be_made(
    world, content, operation, words
):
    parent = await world.ready(content)
    for made in await world.derive(parent, operation):
        assert (made.state, made.report.findings[0].code) == (DatasetState.ERROR, "cannot_prepare")
        assert words in made.report.findings[0].message
    with pytest.raises(InvalidArgument, match=re.escape(words)):
        await world.preparation().count("acme", parent.id, operation)


async def test_rows_are_dropped_by_what_an_audit_found(world):
    await world.base_models.add_tiny(world.objects)
    long = [row("Go on.", "word " * 400), row("Who?", "ada@analytical.io wrote it")]
    story = "Once upon a time three little pigs built a house of straw, one of sticks and one of bricks, and "
    near = [row("Tell me a story.", story * 3 + end) for end in ("the wolf came", "then a wolf came")]
    parent = await world.ready(jsonl([*ROWS[:12], *long, *near, ROWS[0]]))
    operation = Drop((2,), ("email", "truncated"), AuditChoice("baseModels/tiny", context_limit=256))
    service = world.preparation()
    with pytest.raises(Unavailable, match="being audited"):
        await service.prepare("acme", parent.id, operation, "")
    await world.audit()
    (made,) = await world.derive(parent, operation)
    assert await world.content(made) == jsonl([ROWS[0], *ROWS[2:12], *near, ROWS[0]])
    assert made.preparation.operation.audit.key
    with pytest.raises(FailedPrecondition, match="audit whose findings are meant has gone"):
        await service.indexes.found_lines("0" * 64, ("email",))
    deduped = Dedupe(replace(operation.audit, context_limit=0))
    with suppress(Unavailable):
        await service.prepare("acme", parent.id, deduped, "")
    await world.audit()
    (made,) = await world.derive(parent, deduped)
    found = await world.content(made)
    assert found.count(jsonl(ROWS[:1])) == 1 and found.count(b"Tell me a story") == 1
    with pytest.raises(NotFound):
        await service.prepare("acme", parent.id, Dedupe(AuditChoice("baseModels/none")), "")
    wrong = Dedupe(AuditChoice("baseModels/tiny", method="dpo"))
    with pytest.raises(FailedPrecondition, match="cannot be audited: The method dpo"):
        await service.prepare("acme", parent.id, wrong, "")


async def test_what_is_made_of_a_deleted_dataset_fails_and_names_it(world, service):
    parent = await world.ready(SIXTY)
    await world.prepare()
    (made,) = await world.preparation().prepare("acme", parent.id, Dedupe(), "")
    await service.delete("acme", parent.id)
    await world.sweep()
    await world.prepare()
    found = await service.get("acme", made.dataset.id)
    assert (found.state, found.report.findings[0].code) == (DatasetState.ERROR, "parent_deleted")


async def test_only_ready_training_files_have_rows(world, service):
    other = await world.ready(b"anything", purpose="user_data")
    waiting = await service.create("acme", "a.jsonl", "fine-tune", None, "")
    preparation = world.preparation()
    for dataset, reason in ((other, "WRONG_PURPOSE"), (waiting, "NOT_READY")):
        with pytest.raises(FailedPrecondition) as error:
            await preparation.prepare("acme", dataset.id, Dedupe(), "")
        assert error.value.reason == reason
    with pytest.raises(NotFound):
        await preparation.prepare("other", other.id, Dedupe(), "")


async def test_a_repeated_request_makes_nothing_new(world):
    parent = await world.ready(SIXTY)
    service = world.preparation()
    first = await service.prepare("acme", parent.id, Split(1, 0.5), "r1")
    assert await service.prepare("acme", parent.id, Split(1, 0.5), "r1") == first
    assert len({each.dataset.id for each in first}) == 2


async def test_a_job_may_be_asked_for_before_the_dataset_is_written(world, service):
    await world.base_models.add_tiny(world.objects)
    parent = await world.ready(SIXTY)
    (made,) = await world.preparation().prepare("acme", parent.id, Dedupe(), "")
    await world.validate()
    assert (await audit(world, made.dataset)).state is AuditState.RUNNING
    await world.prepare()
    await world.validate()
    assert (await settled_audit(world, made.dataset)).state is AuditState.READY


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("method", ["set_indexed", "set_written"])
async def test_a_process_that_dies_between_its_writes_loses_nothing(world, service, method, after):
    parent = await world.ready(SIXTY)
    (made,) = await world.preparation().prepare("acme", parent.id, Dedupe(), "")
    for calls in range(3):
        with suppress(Died, Unavailable):
            await world.prepare(objects=DyingStore(world.objects, calls, after=after))
        with suppress(Died, Unavailable):
            await world.prepare(store=DyingRows(world.store, method, after=after))
    await world.prepare()
    await world.validate()
    await world.prepare()
    found = await service.get("acme", made.dataset.id)
    assert (found.state, found.sha256) == (DatasetState.READY, sha(SIXTY))
    assert world.objects.keys() == [blob_key(sha(SIXTY)), index_key(sha(SIXTY))]


async def test_a_dataset_deleted_before_it_was_written_leaves_nothing(world, service):
    parent = await world.ready(SIXTY)
    (made,) = await world.preparation().prepare("acme", parent.id, Sample(1, 20), "")
    await world.prepare()
    await service.delete("acme", made.dataset.id)
    await service.delete("acme", parent.id)
    await world.sweep()
    await world.prepare()
    assert world.objects.keys() == []


async def test_the_index_goes_with_the_last_file_of_its_content(world, service):
    one, two = await world.ready(), await world.ready()
    await world.prepare()
    await service.delete("acme", one.id)
    await world.sweep()
    assert await world.objects.head(index_key(sha(GOOD))) is not None
    await service.delete("acme", two.id)
    await world.sweep()
    assert world.objects.keys() == []


# --- rows --------------------------------------------------------------------------------------------------------


async def test_a_diff_counts_what_is_only_here_there_and_in_both(world):
    one = await world.ready(jsonl(ROWS[:20]))
    other = await world.ready(jsonl([*ROWS[5:20], row("new"), *ROWS[:2]]))
    await world.prepare()
    found = await world.preparation().diff("acme", one.id, other.id)
    assert (found.only_in_first.count, found.only_in_first.first) == (3, ((3, 0), (4, 0), (5, 0)))
    assert (found.only_in_second.count, found.only_in_second.first) == (1, ((0, 16),))
    assert (found.in_both.count, found.moved.count) == (17, 2)


async def test_a_row_is_found_by_its_text_its_line_and_its_digest(world):
    one = await world.ready(SIXTY)
    spelled = json.dumps(ROWS[7], separators=(",", ":")).encode()
    other = await world.ready(GOOD + spelled + b"\n" + spelled + b"\n")
    copy = await world.ready(SIXTY, name="copy.jsonl")
    await world.ready(GOOD)
    await world.prepare()
    service = world.preparation()
    found = await service.find_row("acme", spelled)
    assert [(each.dataset.id, each.count, each.first_lines) for each in found.places] == [
        (one.id, 1, (8,)),
        (other.id, 2, (13, 14)),
        (copy.id, 1, (8,)),
    ]
    assert json.loads(found.row) == ROWS[7]
    assert await service.find_line("acme", other.id, 14) == found
    assert await service.find_digest("acme", found.digest) == found
    nowhere = await service.find_row("acme", json.dumps(row("never seen")).encode())
    assert nowhere.places == () and nowhere.row == b""
    with pytest.raises(NotFound, match="no row on line 15"):
        await service.find_line("acme", other.id, 15)
    with pytest.raises(InvalidArgument, match="no training row"):
        await service.find_row("acme", b'{"messages": 3}')


class Fetches:
    """Objects, and which were fetched."""

    def __init__(self, objects):
        self._objects, self.keys = objects, []

    def __getattr__(self, name):
        return getattr(self._objects, name)

    async def fetch(self, key, path):
        self.keys.append(key)
        await self._objects.fetch(key, path)


@pytest.mark.parametrize(("kept_bytes", "fetches"), [(1 << 20, 2), (0, 6)])
async def test_indexes_are_not_fetched_for_every_question(world, kept_bytes, fetches):
    for content in (SIXTY, GOOD):
        await world.ready(content)
    await world.prepare()
    objects = Fetches(world.objects)
    service = world.preparation(objects=objects)
    service = replace(service, indexes=replace(service.indexes, kept_bytes=kept_bytes))
    for _ in range(3):
        found = await service.find_row("acme", json.dumps(ROWS[3]).encode())
        assert [place.first_lines for place in found.places] == [(4,)]
    assert len(objects.keys) == fetches
    kept = list((world.folder / "rows" / "kept").iterdir())
    assert len(kept) == (2 if kept_bytes else 1)


async def test_what_a_job_trained_on_is_known_as_long_as_the_project_has_the_bytes(world, service):
    await world.base_models.add_tiny(world.objects)
    dataset, copy = await world.ready(SIXTY), await world.ready(SIXTY)
    made = await settled_audit(world, dataset)
    lookup = world.preparation().trained_rows
    found, shown = await lookup("acme", dataset.sha256, made.key)
    assert [each.id for each in found] == [dataset.id, copy.id] and shown == made
    told = trained_rows_pb(found, shown).audit
    assert told.HasField("report")
    assert not (told.object_key or told.sha256 or told.findings_object_key or told.findings_sha256)
    assert (await lookup("other", dataset.sha256, made.key)) == ([], None)
    assert (await lookup("acme", dataset.sha256, "0" * 64))[1] is None
    other = await world.ready(GOOD)
    assert (await lookup("acme", other.sha256, made.key))[1] is None
    for each in (dataset, copy):
        await service.delete("acme", each.id)
    assert await lookup("acme", dataset.sha256, made.key) == ([], None)


# --- held-out sets -----------------------------------------------------------------------------------------------


async def test_of_many_frozen_rows_the_first_lines_are_named(world):
    await world.base_models.add_tiny(world.objects)
    frozen, train = await world.ready(SIXTY), await world.ready(GOOD + SIXTY)
    await world.prepare()
    await world.preparation().freeze("acme", frozen.id, "exam-1")
    (finding,) = (await settled_audit(world, train)).report.findings
    assert "60 row(s)" in finding.message and "on line(s) 13, 14" in finding.message
    assert " 32:" in finding.message and "33" not in finding.message


async def test_a_file_with_a_frozen_row_trains_no_job_and_the_lines_are_named(world):
    await world.base_models.add_tiny(world.objects)
    parent = await world.ready(SIXTY)
    train, held_out = await world.derive(parent, Split(1, count=12))
    frozen = await world.preparation().freeze("acme", held_out.id, "exam-1")
    assert frozen.frozen_as == "exam-1"
    assert (await settled_audit(world, train)).state is AuditState.READY
    assert (await settled_audit(world, held_out, held_out=True)).state is AuditState.READY
    # The whole file, the set itself, and one of its rows in another spelling among other rows.
    line = (await world.content(held_out)).splitlines()[3]
    respelled = json.dumps(json.loads(line), separators=(",", ":"), sort_keys=True).encode()
    sneaked = await world.ready(GOOD + respelled + b"\n")
    for file, count in ((parent, 12), (held_out, 12), (sneaked, 1)):
        found = await settled_audit(world, file)
        assert found.state is AuditState.ERROR
        finding = found.report.findings[0]
        assert finding.code == "frozen_row" and "'exam-1'" in finding.message
        assert f"{count} row(s)" in finding.message
    assert "line(s) 13:" in finding.message
    (cleared,) = await world.derive(sneaked, Drop((13,)))
    assert (await settled_audit(world, cleared)).state is AuditState.READY


async def test_all_rows_of_held_out_sets_are_dropped_at_once(world):
    await world.base_models.add_tiny(world.objects)
    parent = await world.ready(jsonl([*ROWS, row("Who?", "ada@analytical.io wrote it")]))
    by_finding = Drop((), ("frozen_row", "email"), AuditChoice("baseModels/tiny"))
    with pytest.raises(InvalidArgument, match="has no held-out set"):
        await drop(world, parent, by_finding)
    exams = [await world.ready(jsonl(ROWS[start : start + 15])) for start in (0, 20)]
    for number, exam in enumerate(exams):
        await world.preparation().freeze("acme", exam.id, f"exam-{number}")
    made = await drop(world, parent, by_finding)
    assert await world.content(made) == jsonl(ROWS[15:20] + ROWS[35:60])
    assert made.preparation.operation.frozen == tuple(sorted(exam.sha256 for exam in exams))
    assert (await settled_audit(world, made)).state is AuditState.READY
    # What was meant is kept: a set that is frozen later changes nothing.
    assert from_json(to_json(made.preparation)) == made.preparation


async def drop(world, parent, operation):
    for _ in range(3):
        await world.prepare()
        await world.audit()
        with suppress(Unavailable):
            (made,) = await world.derive(parent, operation)
            return made
    raise AssertionError("it is never there")


def pair(question, chosen, rejected):
    answers = {"preferred_output": chosen, "non_preferred_output": rejected}
    written = {key: [{"role": "assistant", "content": text}] for key, text in answers.items()}
    return {"input": {"messages": [{"role": "user", "content": question}]}, **written}


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        ("supervised", [{"prompt": f"Question {n}", "completion": f" Answer {n}"} for n in range(12, 24)]),
        ("dpo", [pair(f"Question {n}", f"Answer {n}", "No.") for n in range(12, 24)]),
        ("orpo", [pair(f"Question {n}", "No.", f"Answer {n}") for n in range(12, 24)]),
        ("kto", [{**row(f"Question {n}", f"Answer {n}"), "label": n % 2 == 0} for n in range(12, 24)]),
    ],
)
async def test_a_held_out_row_with_a_verdict_on_it_is_one_still(world, method, rows):
    await world.base_models.add_tiny(world.objects)
    exam = await world.ready(jsonl([row(f"Question {n}", f"Answer {n}") for n in range(12)]))
    await world.preparation().freeze("acme", exam.id, "exam")
    options = AuditOptions(method)
    for content, line in ((jsonl(rows), None), (jsonl([*rows, sneaked(rows[0])]), 13)):
        file = await world.ready(content)
        found = await settled_audit(world, file, options=options)
        assert found.state is (AuditState.READY if line is None else AuditState.ERROR)
        if line is not None:
            assert "1 row(s)" in found.report.findings[0].message
            assert f"line(s) {line}:" in found.report.findings[0].message


def sneaked(row):
    """The same row about the third question of the exam."""
    return json.loads(json.dumps(row).replace("12", "3"))


async def test_a_frozen_set_stays_until_it_is_thawed(world, service):
    dataset = await world.ready()
    preparation = world.preparation()
    await preparation.freeze("acme", dataset.id, "exam")
    assert (await preparation.freeze("acme", dataset.id, "exam")).frozen_as == "exam"
    with pytest.raises(FailedPrecondition, match="exam"):
        await preparation.freeze("acme", dataset.id, "other")
    other = await world.ready(SIXTY)
    with pytest.raises(AlreadyExists, match="another name"):
        await preparation.freeze("acme", other.id, "exam")
    with pytest.raises(FailedPrecondition, match="thaw"):
        await service.delete("acme", dataset.id)
    assert (await preparation.thaw("acme", dataset.id)).frozen_as == ""
    await service.delete("acme", dataset.id)
    with pytest.raises(InvalidArgument, match="frozen_as"):
        await preparation.freeze("acme", other.id, "Exam 1")


async def test_a_frozen_set_of_another_project_says_nothing_here(world, service):
    await world.base_models.add_tiny(world.objects)
    dataset = await world.ready()
    theirs = await service.create("other", "a.jsonl", "fine-tune", None, "")
    await world.objects.put(theirs.staging_key, GOOD)
    await service.commit_upload("other", theirs.id, theirs.staging_key, len(GOOD), sha(GOOD))
    await world.validate()
    await world.preparation().freeze("other", theirs.id, "exam")
    assert (await settled_audit(world, dataset)).state is AuditState.READY


async def test_a_comparison_waits_neither_for_a_dataset_that_is_written_nor_for_the_index_of_another(world):
    exam, file = await world.ready(), await world.ready(SIXTY)
    await world.prepare()
    await world.preparation().prepare("acme", file.id, Sample(1, 20), "")
    large = await world.ready(jsonl(row(f"Large {n}") for n in range(12)))
    await world.store.overlap(exam.sha256, file.sha256)
    reading, compared = asyncio.Semaphore(0), asyncio.Event()

    class Slow:
        """Its blobs are gigabytes: they end only when the comparison is there."""

        def __getattr__(self, name):
            return getattr(world.objects, name)

        async def stream(self, key, **options):
            reading.release()
            await compared.wait()
            async for chunk in world.objects.stream(key, **options):
                yield chunk

    service = world.preparation(objects=Slow())
    work = Preparing(world.store, service.indexes.objects, service.indexes, service.truncations)
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(60):
        tasks.create_task(work.index_all())
        tasks.create_task(work.write_all())
        for _ in range(2):
            await reading.acquire()
        await work.compare_all()
        assert (await world.store.overlap(exam.sha256, file.sha256)).count == 0
        assert large.sha256 in await world.store.to_index(VERSION) and await world.store.unwritten()
        compared.set()
    assert await world.store.to_index(VERSION) == [] and await world.store.unwritten() == []


async def test_what_is_known_of_a_pair_goes_with_its_files(world, service):
    await world.base_models.add_tiny(world.objects)
    exam, file = await world.ready(), await world.ready(SIXTY)
    await world.preparation().freeze("acme", exam.id, "exam")
    assert (await settled_audit(world, file)).state is AuditState.READY
    assert (await world.store.overlap(exam.sha256, file.sha256)).count == 0
    await service.delete("acme", file.id)
    await world.sweep()
    assert (await world.store.overlap(exam.sha256, file.sha256)).count is None
