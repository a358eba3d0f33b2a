"""Datasets whose rows fit into a limit, over a database and a store that outlive processes."""

import json
from contextlib import suppress

import pytest

from lathe.common.errors import FailedPrecondition, InvalidArgument, Unavailable
from lathe.datasets.model import AuditOptions, DatasetState, blob_key
from lathe.datasets.operations import AuditChoice, Truncate, findings_of
from lathe.text.findings import KINDS
from tests.fixtures.worlds import Died, DyingRows, DyingStore
from tests.unit.datasets.conftest import jsonl, row

TINY = "baseModels/tiny"
SHORT = [row(f"Question {n}", f"Answer {n % 3}") for n in range(12)]


def chat(exchanges, answer="It is so."):
    turns = [turn for n in range(exchanges) for turn in row(f"Is {n} a number?", answer)["messages"]]
    return {"messages": [{"role": "system", "content": "Be brief."}, *turns]}


LONG, HOPELESS = chat(30), row("Go on.", "word " * 400)
ROWS = [*SHORT[:3], LONG, *SHORT[3:6], HOPELESS, *SHORT[6:]]
LIMIT = 128


def truncation(policy="drop_oldest", *, limit=LIMIT, keep_unfit=False, method=""):
    return Truncate(AuditChoice(TINY, method=method, context_limit=limit), policy, keep_unfit)


async def ready(world, rows=ROWS):
    await world.base_models.add_tiny(world.objects)
    return await world.ready(jsonl(rows))


async def truncated(world, parent, operation):
    with suppress(Unavailable):
        await world.preparation().count("acme", parent.id, operation)
    await world.audit()
    (made,) = await world.derive(parent, operation)
    return made


async def rows_of(world, made):
    return [json.loads(line) for line in (await world.content(made)).splitlines()]


async def test_what_is_too_long_is_shortened_and_the_rest_keeps_its_bytes(world):
    parent = await ready(world)
    made = await truncated(world, parent, truncation())
    assert (made.state, made.report.example_count) == (DatasetState.READY, len(ROWS) - 1)
    assert made.display_name == "train.truncate.jsonl" and made.preparation.operation.audit.key
    rows = await rows_of(world, made)
    shortened = rows.pop(3)["messages"]
    assert rows == SHORT
    assert shortened[0] == LONG["messages"][0] and shortened[1:] == LONG["messages"][1 - len(shortened) :]
    assert 3 <= len(shortened) < len(LONG["messages"])


async def test_nothing_is_made_of_a_file_that_is_damaged(world):
    parent = await ready(world)
    made = await truncated(world, parent, truncation())
    content = await world.content(parent)
    await world.objects.put(blob_key(parent.sha256), content.replace(b"Answer 1", b"Answer 7"))
    (again,) = await world.derive(parent, made.preparation.operation)
    assert (again.state, again.report.findings[0].code) == (DatasetState.ERROR, "cannot_prepare")


async def test_a_job_on_what_is_made_cuts_nothing_and_it_is_left_as_it_is(world):
    made = await truncated(world, await ready(world), truncation())
    options = AuditOptions(context_limit=LIMIT)
    await world.start().ensure_audit("acme", made.id, TINY, options)
    await world.audit()
    found = await world.start().ensure_audit("acme", made.id, TINY, options)
    assert found.result.truncated_rows == 0
    assert found.result.max_row_tokens <= LIMIT
    assert (await truncated(world, made, truncation())).sha256 == made.sha256


async def test_a_dry_run_counts_what_would_become_of_the_rows(world):
    parent = await ready(world)

    async def counted(operation):
        with suppress(Unavailable):
            await world.preparation().count("acme", parent.id, operation)
        await world.audit()
        rows, (one,) = await world.preparation().count("acme", parent.id, operation)
        return rows, one.rows, one.shortened, one.unfit

    assert await counted(truncation()) == (14, 13, 1, 0)
    assert await counted(truncation(keep_unfit=True)) == (14, 14, 1, 1)
    assert await counted(truncation("drop_row")) == (14, 12, 0, 0)
    assert await counted(truncation("cut_end")) == (14, 13, 1, 0)
    assert await counted(truncation(limit=0)) == (14, 13, 1, 0)
    assert len(await world.store.training_files("acme")) == 1


async def test_rows_that_cannot_fit_may_stay(world):
    made = await truncated(world, await ready(world), truncation(keep_unfit=True))
    assert (await rows_of(world, made))[7] == HOPELESS


async def test_pairs_and_texts_are_shortened_too(world):
    prompt = LONG["messages"][:-1]
    pairs = [
        {
            "input": {"messages": [*prompt, {"role": "user", "content": f"And {n}?"}]},
            "preferred_output": [{"role": "assistant", "content": "Yes."}],
            "non_preferred_output": [{"role": "assistant", "content": "No."}],
        }
        for n in range(12)
    ]
    made = await truncated(world, await ready(world, pairs), truncation(method="dpo"))
    first = (await rows_of(world, made))[0]
    assert first["preferred_output"] == pairs[0]["preferred_output"]
    kept = first["input"]["messages"]
    assert kept[0] == prompt[0] and kept[1:] == pairs[0]["input"]["messages"][1 - len(kept) :]
    texts = [{"text": f"{n} " + "Once upon a time " * 60} for n in range(12)]
    made = await truncated(world, await world.ready(jsonl(texts)), truncation("cut_end"))
    for before, after in zip(texts, await rows_of(world, made), strict=True):
        assert before["text"].startswith(after["text"]) and len(after["text"]) < len(before["text"])


async def test_what_cannot_be_meant_is_refused(world):
    parent = await ready(world)
    for operation, words in (
        (truncation("middle"), "drop_oldest, cut_end, drop_row"),
        (truncation(limit=9999), "context_limit"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            await world.preparation().prepare("acme", parent.id, operation, "")
    with pytest.raises(FailedPrecondition, match="cannot be audited: The method dpo"):
        await world.preparation().prepare("acme", parent.id, truncation(method="dpo"), "")


@pytest.mark.parametrize("after", [False, True])
async def test_a_process_that_dies_between_its_writes_makes_the_same(world, after):
    parent = await ready(world)
    wanted = await truncated(world, parent, truncation())
    (made,) = await world.preparation().prepare("acme", parent.id, truncation(), "")
    for calls in range(3):
        with suppress(Died, Unavailable):
            await world.prepare(objects=DyingStore(world.objects, calls, after=after))
        with suppress(Died, Unavailable):
            await world.prepare(store=DyingRows(world.store, "set_written", after=after))
    await world.prepare()
    await world.validate()
    found = await world.start().get("acme", made.dataset.id)
    assert (found.state, found.sha256) == (DatasetState.READY, wanted.sha256)
    assert blob_key(found.sha256) in set(world.objects.keys())


def test_the_findings_of_long_rows_are_in_the_catalog():
    assert set(findings_of(truncation())) <= set(KINDS)
