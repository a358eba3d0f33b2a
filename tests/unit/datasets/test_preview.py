"""Rows as the model sees them, from what the audit stored; a training file beside its validation file."""

from __future__ import annotations

import pytest

from lathe.common.errors import DataLoss, InvalidArgument
from lathe.datasets import preview
from lathe.datasets.model import AuditOptions, AuditState
from lathe.datasets.preview import Previews
from lathe.datasets.tokenizers import TokenizerCache
from lathe.text.findinglines import read_finding_lines
from lathe.text.formats import Role
from tests.fixtures.tiny import CHATML
from tests.unit.datasets.conftest import jsonl, row

TINY = "baseModels/tiny"
OPTIONS = AuditOptions()


@pytest.fixture
async def base(world):
    return await world.base_models.add_tiny(world.objects)


def previews(world) -> Previews:
    tokenizers = TokenizerCache(world.objects, world.folder)
    return Previews(world.start(), world.objects, tokenizers, world.folder)


async def previewed(world, dataset, lines=(), options=OPTIONS):
    shown = previews(world)
    audit, sequences = await shown.preview("acme", dataset.id, TINY, options, lines)
    if audit.state is AuditState.RUNNING:
        assert sequences == []
        await world.audit()
        audit, sequences = await shown.preview("acme", dataset.id, TINY, options, lines)
    return audit, sequences


async def test_a_row_is_shown_as_it_is_trained(world, base):
    dataset = await world.ready(jsonl(row(f"Grüße 🙂 {n}") for n in range(12)))
    _, (sequence,) = await previewed(world, dataset, [4])
    assert (sequence.line, sequence.role) == (4, Role.EXAMPLE)
    text = "".join(text for _, text, _ in sequence.tokens)
    assert text == (
        "<|im_start|>user\nGrüße 🙂 3<|im_end|>\n<|im_start|>assistant\nHow can I help you today?<|im_end|>\n"
    )
    trained = "".join(text for _, text, is_trained in sequence.tokens if is_trained)
    assert trained == "How can I help you today?<|im_end|>"
    assert sequence.token_count == len(sequence.tokens)
    assert sequence.trained_token_count == sum(is_trained for *_, is_trained in sequence.tokens)


async def test_the_first_row_is_shown_unless_others_are_asked_for(world, base):
    dataset = await world.ready()
    assert [sequence.line for sequence in (await previewed(world, dataset))[1]] == [1]
    assert [sequence.line for sequence in (await previewed(world, dataset, [12, 2]))[1]] == [2, 12]
    with pytest.raises(InvalidArgument, match="line 13 is no row"):
        await previewed(world, dataset, [2, 13])
    with pytest.raises(InvalidArgument, match="at most 20"):
        await previewed(world, dataset, range(1, 22))


async def test_what_does_not_fit_into_one_answer_is_left_out(world, base, monkeypatch):
    monkeypatch.setattr(preview, "_MAX_SEQUENCES", 1)
    found = await previewed(world, await world.ready(), [2, 12])
    assert [sequence.line for sequence in found[1]] == [2]


async def test_a_file_that_cannot_train_says_why(world, base):
    dataset = await world.ready(jsonl([*(row(f"Hello {n}") for n in range(12)), row("a", "b " * 600)]))
    audit, sequences = await previewed(world, dataset, options=AuditOptions(truncation="error"))
    assert (audit.state, [sequence.line for sequence in sequences]) == (AuditState.ERROR, [1])
    assert await previewed(world, dataset, [13], AuditOptions(truncation="error")) == (audit, [])
    assert audit.report.groups[0].code == "context_exceeded"
    for line in (14, 0, -1):
        with pytest.raises(InvalidArgument, match=f"line {line} is no row"):
            await previewed(world, dataset, [1, 13, line], AuditOptions(truncation="error"))


async def test_long_rows_are_shown_as_far_as_they_fit(world, base, monkeypatch):
    monkeypatch.setattr(preview, "MAX_TOKENS", 30)
    dataset = await world.ready()
    _, sequences = await previewed(world, dataset, [1, 2, 3])
    assert sum(len(sequence.tokens) for sequence in sequences) == 30
    assert len(sequences[-1].tokens) < sequences[-1].token_count


async def test_only_the_last_token_objects_are_kept(world, base):
    for number in range(6):
        await previewed(world, await world.ready(jsonl(row(f"Hello {number} {n}") for n in range(12))))
    assert len(list((world.folder / "previews").iterdir())) == 4


async def test_they_take_no_more_disk_than_they_may(world, base, monkeypatch):
    monkeypatch.setattr(preview, "_KEPT_BYTES", 1)
    for number in range(3):
        await previewed(world, await world.ready(jsonl(row(f"Hello {number} {n}") for n in range(12))))
    assert len(list((world.folder / "previews").iterdir())) == 1
    await previews(world).start()
    assert not (world.folder / "previews").exists()


async def test_what_both_files_hold_is_found(world, base, tmp_path):
    rows = [row(f"Hello {n}") for n in range(12)]
    train = await world.ready(jsonl(rows))
    valid = await world.ready(jsonl([*(row(f"Goodbye {n}") for n in range(12)), rows[6]]), name="valid.jsonl")
    service = world.start()

    async def ask():
        return await service.ensure_audit("acme", train.id, TINY, OPTIONS, validation=valid.id)

    for _ in range(3):
        assert (await ask()).state is AuditState.RUNNING
        await world.audit()
    audit = await ask()
    assert audit.state is AuditState.READY
    (group,) = audit.report.groups
    assert (group.code, group.count, group.lines) == ("validation_duplicate", 1, (7,))
    assert "line 13 of the validation file" in audit.report.findings[0].message
    alone = await service.ensure_audit("acme", train.id, TINY, OPTIONS)
    assert (alone.key, alone.result) == (audit.key, audit.result) and alone.report.groups == ()
    path = tmp_path / "findings.arrow"
    await world.objects.fetch(alone.findings_key, path)
    assert list(read_finding_lines(path)) == []


async def test_both_files_hold_a_row_whatever_day_each_is_audited_on(world):
    dated = "{{ strftime_now('%d %b %Y, and so on through the day and the night') + '\n' }}" + CHATML
    await world.base_models.add_tiny(world.objects, template=dated)
    train = await world.ready(jsonl(row(f"Hello {n}") for n in range(12)))
    valid = await world.ready(jsonl(row(f"Hello {n}") for n in range(11, 23)), name="valid.jsonl")
    service = world.start()
    await service.ensure_audit("acme", valid.id, TINY, OPTIONS, held_out=True)
    await world.audit()
    world.clock.tick(86_400)
    for _ in range(3):
        audit = await service.ensure_audit("acme", train.id, TINY, OPTIONS, validation=valid.id)
        await world.audit()
    assert [(group.code, group.lines) for group in audit.report.groups] == [("validation_duplicate", (12,))]


async def test_damaged_tokens_are_neither_shown_nor_compared(world, base):
    train = await world.ready()
    valid = await world.ready(jsonl(row(f"Goodbye {n}") for n in range(12)), name="valid.jsonl")
    audit, _ = await previewed(world, train)
    await previews(world).start()
    content = await world.objects.get(audit.tokens_key)
    await world.objects.put(audit.tokens_key, content.replace(*_other_token(content)))
    with pytest.raises(DataLoss, match="damaged"):
        await previewed(world, train)
    with pytest.raises(DataLoss, match="damaged"):
        await previewed(world, train)
    for _ in range(3):
        found = await world.start().ensure_audit("acme", train.id, TINY, OPTIONS, validation=valid.id)
        await world.audit()
    assert found.state is AuditState.FAILED and "damaged" in found.report.findings[0].message


def _other_token(content: bytes) -> tuple[bytes, bytes]:
    """Bytes of the file, and as many others."""
    middle = content[len(content) // 2 :][:8]
    return middle, bytes(byte ^ 1 for byte in middle)
