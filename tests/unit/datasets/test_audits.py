"""Tokens and loss mask, once per dataset and base model."""

import errno
import re
from datetime import timedelta

import pytest

from lathe.common.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unimplemented,
)
from lathe.datasets.auditing import Auditor
from lathe.datasets.model import AuditOptions, AuditState, Report, blob_key, check_format
from lathe.text.arrow import read_tokens
from lathe.text.findinglines import read_finding_lines
from lathe.text.formats import Role, RowFormat
from lathe.text.tokenizer import Tokenizer
from tests.fixtures.tiny import tiny_tokenizer_config, tiny_tokenizer_json
from tests.fixtures.worlds import Died, DyingRows, DyingStore
from tests.unit.datasets.conftest import GOOD, jsonl, row, sha

TINY = "baseModels/tiny"
OPTIONS = AuditOptions()


async def ensure(world, dataset, options=OPTIONS, base=TINY):
    return await world.start().ensure_audit("acme", dataset.id, base, options)


async def audited(world, dataset, options=OPTIONS, base=TINY):
    assert (await ensure(world, dataset, options, base)).state is AuditState.RUNNING
    await world.audit()
    return await ensure(world, dataset, options, base)


@pytest.fixture
async def base(world):
    return await world.base_models.add_tiny(world.objects)


async def table(world, audit, tmp_path):
    path = tmp_path / "tokens.arrow"
    await world.objects.fetch(audit.object_key, path)
    return read_tokens(path)


async def test_every_row_is_tokenised_once_and_only_answers_are_trained(world, base, tmp_path):
    dataset = await world.ready()
    audit = await audited(world, dataset)
    assert audit.state is AuditState.READY and audit.report.finding_count == 0
    found = await table(world, audit, tmp_path)
    tokenizer = Tokenizer.from_files(tiny_tokenizer_json().encode(), tiny_tokenizer_config())
    assert audit.result.rows == len(found) == 12 and found.lines == list(range(1, 13))
    assert audit.result.tokens == sum(len(tokens) for tokens in found.tokens)
    assert audit.result.trained_tokens == sum(int(mask.sum()) for mask in found.mask)
    assert audit.result.max_row_tokens == max(len(tokens) for tokens in found.tokens)
    for tokens, mask in zip(found.tokens, found.mask, strict=True):
        trained = tokenizer.decode(tokens[mask].tolist(), skip_special_tokens=False)
        assert trained == "How can I help you today?<|im_end|>"
    assert sha(await world.objects.get(audit.object_key)) == audit.result.sha256
    assert found.metadata["key"] == audit.key and found.metadata["dataset"] == sha(GOOD)


async def test_the_same_content_for_the_same_tokenizer_is_one_audit(world, base):
    first = await audited(world, await world.ready())
    again = await ensure(world, await world.ready(name="copy.jsonl"))
    assert again == first
    other = await ensure(world, await world.ready(), AuditOptions(context_limit=64))
    assert other.key != first.key and other.state is AuditState.RUNNING


async def test_a_dataset_that_is_not_ready_answers_for_its_audit(world, base):
    dataset = await world.upload()
    waiting = await ensure(world, dataset)
    assert (waiting.state, waiting.key) == (AuditState.RUNNING, "")
    bad = await world.ready(jsonl([row()] * 3))
    refused = await ensure(world, bad)
    assert refused.state is AuditState.ERROR
    assert refused.report.findings[0].code == "invalid_n_examples"
    new = await world.start().create("acme", "a", "fine-tune", None, "")
    with pytest.raises(FailedPrecondition, match="not been uploaded"):
        await ensure(world, new)
    evals = await world.ready(b"{}\n", purpose="evals")
    with pytest.raises(FailedPrecondition, match="purpose fine-tune"):
        await ensure(world, evals)


async def test_what_cannot_be_audited_says_why(world, base):
    dataset = await world.ready()
    with pytest.raises(NotFound):
        await world.start().ensure_audit("other", dataset.id, TINY, OPTIONS)
    with pytest.raises(NotFound):
        await ensure(world, dataset, base="baseModels/none")
    with pytest.raises(Unimplemented, match="method"):
        await ensure(world, dataset, AuditOptions(method="reinforcement"))
    with pytest.raises(InvalidArgument, match="context_limit"):
        await ensure(world, dataset, AuditOptions(context_limit=513))
    with pytest.raises(InvalidArgument, match="truncation"):
        await ensure(world, dataset, AuditOptions(truncation="middle"))


async def test_cut_rows_are_named_and_a_row_with_nothing_to_train_is_an_error(world, base):
    short = [row(f"Hi {n}", "Yes, of course") for n in range(10)]
    cut = await audited(
        world,
        await world.ready(jsonl([*short, row("Hi", "How can I help you today? " * 20)])),
        AuditOptions(context_limit=64),
    )
    assert cut.state is AuditState.READY
    assert (cut.result.truncated_rows, cut.result.max_row_tokens, cut.result.rows) == (1, 64, 11)
    assert [(found.line, found.field, found.code) for found in cut.report.findings] == [
        (11, "messages", "truncated")
    ]
    long = jsonl([row("Hello how can I help you today? " * 20, "Yes, of course"), *short])
    empty = await audited(world, await world.ready(long), AuditOptions(context_limit=64))
    assert (empty.state, empty.object_key) == (AuditState.ERROR, "")
    assert (empty.report.findings[0].line, empty.report.findings[0].code) == (1, "nothing_trained")
    strict = await audited(world, await world.ready(long), AuditOptions(context_limit=64, truncation="error"))
    assert [(found.line, found.code) for found in strict.report.findings] == [(1, "context_exceeded")]


async def test_lines_are_those_of_the_file(world, base):
    weightless = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    }
    content = (
        b"\xef\xbb\xbf" + jsonl(row(f"Hello {n}") for n in range(10)) + b"\r\n\r\n" + jsonl([weightless])
    )
    audit = await audited(world, await world.ready(content))
    assert [(found.line, found.code) for found in audit.report.findings] == [(13, "nothing_trained")]


async def test_the_bytes_are_the_same_each_time(world, base):
    rows = jsonl([row(f"Hello {n}", "Thank you very much! " * (n % 7 + 1)) for n in range(200)])
    dataset = await world.ready(rows)
    first = await audited(world, dataset)
    await world.start().delete("acme", dataset.id)
    world.clock.tick(timedelta(days=8).total_seconds())
    await world.start().keep_tokens([])
    await world.sweep()
    assert await world.objects.head(first.object_key) is None
    assert await audited(world, await world.ready(rows)) == first


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("method", ["set_audit_objects", "finish_audit", None])
async def test_an_audit_interrupted_anywhere_goes_on(world, base, method, after):
    dataset = await world.ready()
    await ensure(world, dataset)
    with pytest.raises(Died):
        if method is None:
            # The objects' only change is the token object itself.
            await _run_only(world, DyingStore(world.objects, 0, after=after))
        else:
            await _run_only(world, world.objects, DyingRows(world.store, method, after=after))
    await world.audit()
    audit = await ensure(world, dataset)
    assert audit.state is AuditState.READY
    assert sha(await world.objects.get(audit.object_key)) == audit.result.sha256


async def _run_only(world, objects, store=None):
    (task,) = await world.store.running_audits()
    await Auditor(store or world.store, objects, world.folder).run(task)


async def test_an_outage_waits(world, base):
    dataset = await world.ready()
    await ensure(world, dataset)
    world.objects.outage = Unavailable("away", retry_after=1)
    with pytest.raises(Unavailable):
        await world.audit()
    world.objects.outage = None
    assert (await ensure(world, dataset)).state is AuditState.RUNNING
    await world.audit()
    assert (await ensure(world, dataset)).state is AuditState.READY


async def test_a_dataset_deleted_while_it_is_audited_leaves_nothing(world, base):
    dataset = await world.ready()
    await ensure(world, dataset)
    await world.start().delete("acme", dataset.id)
    await world.sweep()
    await world.audit()
    assert await world.store.running_audits() == []
    assert not [key for key in sorted(world.objects.keys()) if key.startswith("blobs/")]
    again = await audited(world, await world.ready())
    assert again.state is AuditState.READY


async def test_a_stored_file_that_is_damaged_is_not_audited(world, base):
    dataset = await world.ready()
    await world.objects.put(blob_key(dataset.sha256), GOOD.replace(b"Hello", b"Jello", 1))
    failed = await audited(world, dataset)
    assert (failed.state, failed.report.findings[0].code) == (AuditState.FAILED, "server_error")
    assert "damaged" in failed.report.findings[0].message and not failed.object_key


@pytest.mark.parametrize("name", ["again.jsonl", "again.csv"])
async def test_the_next_upload_of_the_same_bytes_heals_a_file_that_is_damaged(world, base, name):
    table = b"prompt,completion\n" + b"".join(b"Hello %d,Hi\n" % n for n in range(12))
    content = table if name.endswith(".csv") else GOOD
    dataset = await world.ready(content, name=name)
    good = await world.content(dataset)
    await world.objects.put(blob_key(dataset.sha256), good.replace(b"Hello", b"Jello", 1))
    assert (await audited(world, dataset)).state is AuditState.FAILED
    again = await world.ready(content, name=name)
    assert again.sha256 == dataset.sha256
    assert await world.content(dataset) == good
    # Nobody has to wait until the failure is forgotten.
    assert (await audited(world, again)).state is AuditState.READY
    assert (await ensure(world, dataset)).state is AuditState.READY


async def test_damaged_findings_name_no_lines(world, base):
    audit = await audited(world, await world.ready(jsonl([row()] * 12)))
    path = world.folder / "findings"
    await world.objects.fetch(audit.findings_key, path)
    content = path.read_bytes()
    await world.objects.put(audit.findings_key, content.replace(b"duplicate", b"triplicat"))
    with pytest.raises(DataLoss, match="damaged"):
        await world.preparation().indexes.found_lines(audit.key, ("duplicate",))


@pytest.mark.parametrize("passed", [False, True])
async def test_a_fault_of_lathe_itself_is_tried_again_by_the_next_process_and_after_minutes(
    world, base, passed
):
    dataset = await world.ready()
    first = base.files[0]
    content = await world.objects.get(first.object_key)
    await world.objects.put(first.object_key, b"damaged")
    failed = await audited(world, dataset)
    assert (failed.state, failed.report.findings[0].code) == (AuditState.FAILED, "server_error")
    await world.objects.put(first.object_key, content)
    await world.sweep()
    assert (await ensure(world, dataset)).state is AuditState.FAILED
    if passed:
        world.clock.tick(timedelta(minutes=11).total_seconds())
        await world.sweep()
    else:
        await Auditor(world.store, world.objects, world.folder).start()
    assert (await audited(world, dataset)).state is AuditState.READY


async def test_an_audit_that_ends_its_process_again_and_again_is_given_up(world, base):
    dataset = await world.ready()
    await ensure(world, dataset)
    for _ in range(3):
        with pytest.raises(Died):
            await _run_only(world, DyingStore(world.objects, 0, after=False))
    await world.audit()
    failed = await ensure(world, dataset)
    assert failed.state is AuditState.FAILED
    assert "begun 3 times" in failed.report.findings[0].message
    # Neither may a process that starts anew know better, nor is it for the same bytes to try it again.
    await Auditor(world.store, world.objects, world.folder).start()
    await world.ready()
    world.clock.tick(timedelta(minutes=11).total_seconds())
    await world.sweep()
    assert (await ensure(world, dataset)).state is AuditState.FAILED
    world.clock.tick(timedelta(days=2).total_seconds())
    await world.sweep()
    assert (await audited(world, dataset)).state is AuditState.READY


@pytest.mark.parametrize("place", ["TokenWriter._flush", "write_duplicates", "FindingLines.write"])
async def test_a_full_disk_makes_an_audit_wait(world, base, monkeypatch, place):
    dataset = await world.ready()
    await ensure(world, dataset)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"lathe.datasets.auditing.{place}", full)
        for _ in range(5):
            with pytest.raises(Unavailable, match="is full"):
                await world.audit()
    await world.audit()
    assert (await ensure(world, dataset)).state is AuditState.READY


async def test_an_audit_that_cannot_be_finished_does_not_keep_others_waiting(world, base):
    first, second = await world.ready(), await world.ready(jsonl(row(f"Good day {n}") for n in range(12)))
    await ensure(world, first)
    world.clock.tick(1)
    await ensure(world, second)
    (key, _) = [task.key for task in await world.store.running_audits()]

    class Broken:
        def __getattr__(self, name):
            return getattr(world.store, name)

        async def set_audit_objects(self, audit, *digests):
            if audit == key:
                raise RuntimeError("unexpected")
            await world.store.set_audit_objects(audit, *digests)

    with pytest.raises(Unavailable, match="could not be finished"):
        await world.audit(store=Broken())
    assert (await ensure(world, second)).state is AuditState.READY
    assert (await ensure(world, first)).state is AuditState.RUNNING


async def test_token_objects_go_a_week_after_the_last_dataset_and_use(world, base):
    dataset = await world.ready()
    audit = await audited(world, dataset)
    await world.start().delete("acme", dataset.id)
    await world.sweep()
    assert await world.objects.head(audit.object_key) is not None
    assert await world.objects.head(audit.findings_key) is not None
    assert await world.objects.head(blob_key(sha(GOOD))) is None
    world.clock.tick(timedelta(days=7, seconds=1).total_seconds())
    await world.start().keep_tokens([])
    with pytest.raises(Died):
        await world.sweep(store=DyingRows(world.store, "begin_remove_audit", after=True))
    await world.sweep()
    assert await world.objects.head(audit.object_key) is None
    assert await world.objects.head(audit.findings_key) is None
    assert await world.store.left_claims(world.clock.now()) == []


async def test_token_objects_stay_while_a_dataset_needs_them(world, base):
    audit = await audited(world, await world.ready())
    world.clock.tick(timedelta(days=70).total_seconds())
    await world.start().keep_tokens([])
    await world.sweep()
    assert await world.objects.head(audit.object_key) is not None


async def test_token_objects_stay_while_an_unfinished_job_needs_them_and_while_jobs_says_nothing(world, base):
    dataset, other = await world.ready(), await world.ready(jsonl(row(f"Good day {n}") for n in range(12)))
    needed, unneeded = await audited(world, dataset), await audited(world, other)
    for each in (dataset, other):
        await world.start().delete("acme", each.id)

    async def left():
        await world.sweep()
        return [await world.objects.head(audit.object_key) is not None for audit in (needed, unneeded)]

    # jobs has been away since before this process of datasets began, or for more than a day.
    world.clock.tick(timedelta(days=30).total_seconds())
    assert await left() == [True, True]
    await world.start().keep_tokens([needed.result.sha256])
    world.clock.tick(timedelta(days=1).total_seconds())
    assert await left() == [True, True]
    for _ in range(20):
        await world.start().keep_tokens([needed.result.sha256])
        assert await left() == [True, False]
        world.clock.tick(timedelta(hours=23).total_seconds())
    await world.start().keep_tokens([])
    world.clock.tick(timedelta(days=8).total_seconds())
    assert await left() == [True, False]
    await world.start().keep_tokens([])
    assert await left() == [False, False]


def preference(n: int, chosen: str = "How can I help you today?", rejected: str = "No.") -> dict:
    return {
        "input": {"messages": [{"role": "user", "content": f"Hello {n}"}]},
        "preferred_output": [{"role": "assistant", "content": chosen}],
        "non_preferred_output": [{"role": "assistant", "content": rejected}],
    }


async def test_a_preference_file_becomes_pairs(world, base, tmp_path):
    dataset = await world.ready(jsonl(preference(n) for n in range(12)))
    assert dataset.report.format is RowFormat.PREFERENCE
    audit = await audited(world, dataset, AuditOptions(method="dpo"))
    assert (audit.state, audit.report.format) == (AuditState.READY, RowFormat.PREFERENCE)
    found = await table(world, audit, tmp_path)
    assert audit.result.rows == audit.report.example_count == 12
    assert found.roles == [Role.CHOSEN, Role.REJECTED] * 12
    assert found.lines == [line for line in range(1, 13) for _ in range(2)]
    assert audit.result.tokens == sum(len(tokens) for tokens in found.tokens)
    assert await ensure(world, dataset, AuditOptions(method="orpo")) == audit


async def test_a_cut_pair_is_one_note(world, base):
    rows = [preference(n) for n in range(10)] + [preference(10, "How can I help you today? " * 20)]
    audit = await audited(world, await world.ready(jsonl(rows)), AuditOptions(method="dpo", context_limit=64))
    assert (audit.result.truncated_rows, audit.result.rows, audit.result.max_row_tokens) == (1, 11, 64)
    (note,) = audit.report.findings
    assert (note.line, note.code) == (11, "truncated") and note.message.startswith("the chosen output has")


async def test_a_long_text_becomes_several_rows(world, base):
    rows = [{"text": f"One two three {n}"} for n in range(10)] + [
        {"text": "One two three four five six. " * 30}
    ]
    dataset = await world.ready(jsonl(rows))
    audit = await audited(world, dataset, AuditOptions(context_limit=32))
    assert (audit.report.example_count, audit.report.format) == (11, RowFormat.TEXT)
    assert audit.result.rows > 11 and audit.result.max_row_tokens == 32
    assert [(note.line, note.code) for note in audit.report.findings] == [(11, "split")]
    assert audit.result.truncated_rows == 0


@pytest.mark.parametrize(
    ("method", "content", "words"),
    [
        ("dpo", [row(f"Hello {n}") for n in range(12)], "a preference row .* Use the method supervised"),
        ("supervised", [preference(n) for n in range(12)], "a chat row .* Use the method dpo or orpo"),
        ("kto", [{"text": "a"}] * 12, "an unpaired preference row .* Use the method supervised"),
    ],
)
async def test_a_method_trains_on_files_of_its_format(world, base, method, content, words):
    dataset = await world.ready(jsonl(content))
    audit = await ensure(world, dataset, AuditOptions(method=method))
    assert (audit.state, audit.key) == (AuditState.ERROR, "")
    (finding,) = audit.report.findings
    assert (finding.line, finding.code) == (0, "wrong_format")
    assert re.search(words, finding.message)


def test_a_file_validated_before_formats_were_told_is_chat():
    assert check_format("supervised", Report(12)) is None
    assert "a chat row" in check_format("dpo", Report(12)).message


async def findings(world, audit, tmp_path):
    path = tmp_path / "findings.arrow"
    await world.objects.fetch(audit.findings_key, path)
    return list(read_finding_lines(path))


async def test_all_findings_are_stored_by_line(world, base, tmp_path):
    rows = [row(f"Hello {n}") for n in range(12)]
    audit = await audited(world, await world.ready(jsonl([*rows, *rows[:3]])))
    assert audit.state is AuditState.READY
    assert await findings(world, audit, tmp_path) == [(line, "duplicate") for line in (13, 14, 15)]
    (group,) = audit.report.groups
    assert (group.code, group.count, group.lines) == ("duplicate", 3, (13, 14, 15))
    refused = await audited(
        world,
        await world.ready(jsonl([*rows, row("a", "How can I " * 9)])),
        AuditOptions(context_limit=32, truncation="error"),
    )
    assert (refused.state, refused.object_key) == (AuditState.ERROR, "")
    assert await findings(world, refused, tmp_path) == [(13, "context_exceeded")]


async def test_an_audit_counts_over_all_rows(world, base):
    audit = await audited(world, await world.ready(jsonl(row(f"Hello {n}") for n in range(60))))
    statistics = audit.report.statistics
    assert statistics.row_tokens.count == statistics.turn_tokens.count == 60
    assert statistics.prompt_tokens.mean + statistics.completion_tokens.mean < statistics.row_tokens.max
    assert statistics.turns.min == statistics.turns.max == 2
    assert [(share.value, share.count) for share in statistics.answers] == [("How can I help you today?", 60)]
    assert [group.code for group in audit.report.groups] == ["label_imbalance"]
