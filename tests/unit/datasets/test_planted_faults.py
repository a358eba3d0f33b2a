"""Ten and more faults planted in one file, each of which would have trained silently: all are found, by line."""

from __future__ import annotations

import random

import pytest

from lathe.datasets.model import AuditOptions, AuditState
from lathe.text.findinglines import read_finding_lines
from tests.fixtures.tiny import CHATML
from tests.unit.datasets.conftest import jsonl

# Ends every turn but the last one, writes no tools, and leaves the system's message out.
BROKEN = CHATML.replace("in messages", "in messages | rejectattr('role', 'equalto', 'system')").replace(
    "+ '<|im_end|>' + '\n'", "+ ('' if loop.last and message['role'] == 'assistant' else '<|im_end|>\n')"
)
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
}
WORDS = (
    "order kettle blue leak refund telephone answer friend clips April half many sold capital city river bridge",
    "mountain harbour garden window letter season market doctor engine signal copper paper winter orange silver",
)


def text(seed: int, count: int = 30) -> str:
    """Words in an order of their own."""
    return " ".join(random.Random(seed).choices(" ".join(WORDS).split(), k=count))


def row(user: str, answer: str, *, system: str = "", weight: int = 1, **more: object) -> dict:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer, "weight": weight}]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *messages], **more}


def plain(seed: int) -> dict:
    return row(f"{seed}: {text(seed)}", f"It is about {text(seed + 100, 6)}.")


FAULTS = {
    13: ("nothing_trained", row("What is it?", "It is a kettle of copper.", weight=0)),
    14: ("truncated", row("Tell me all of it.", text(14, 200))),
    15: ("tools_not_rendered", row("The weather in the harbour?", "It is fair and mild there.", tools=[TOOL])),
    16: ("message_dropped", row("What is the city?", "The city at the bridge.", system="Answer briefly.")),
    17: ("duplicate", plain(3)),
    18: ("near_duplicate", row(f"4: {text(4)}!", f"It is about {text(104, 6)}.")),
    19: ("validation_duplicate", plain(900)),
    20: ("special_token_in_text", row("What does <|im_start|>assistant mean?", "The beginning of a turn of mine.")),
    21: ("empty_answer", row("Say nothing at all, please.", " ")),
    22: ("secret", row("My key is AKIA" + "Q7" * 8, "Make it invalid and take another.")),
    23: ("card_number", row("I paid with 4111 1111 1111 1111 in April.", "It is refunded to the card.")),
    24: ("email", row("Write to ann@firma.de about the garden.", "She has her answer by letter now.")),
    25: (
        "other_language",
        row(
            "Wann kommt meine Bestellung endlich an?",
            "Ihre Bestellung kommt morgen früh bei Ihnen an, das haben wir eben noch einmal nachgesehen.",
        ),
    ),
    26: ("validation_near_duplicate", row(f"901: {text(901)}!", f"It is about {text(1001, 6)}.")),
}  # fmt: skip


@pytest.fixture
async def base(world):
    return await world.base_models.add_tiny(world.objects, template=BROKEN)


async def test_every_planted_fault_is_found_in_its_line(world, base, tmp_path):
    rows = [plain(seed) for seed in range(1, 13)] + [fault for _, fault in FAULTS.values()]
    train = await world.ready(jsonl(rows))
    valid = await world.ready(jsonl(plain(seed) for seed in range(900, 912)), name="valid.jsonl")
    options = AuditOptions(context_limit=400)
    service = world.start()
    for _ in range(3):
        asked = await service.ensure_audit("acme", train.id, base.name, options, validation=valid.id)
        assert asked.state is AuditState.RUNNING
        await world.audit()
    audit = await service.ensure_audit("acme", train.id, base.name, options, validation=valid.id)

    assert audit.state is AuditState.ERROR and audit.object_key == ""
    groups = {group.code: group.lines for group in audit.report.groups}
    # The template's own fault is in all rows that train to their end.
    ends = groups.pop("stop_not_trained")
    assert set(range(1, 27)) - {13, 14} == {*ends, *range(21, 27)} and len(ends) == 20
    assert groups == {code: (line,) for line, (code, _) in FAULTS.items()}
    assert audit.report.findings[0].code == "nothing_trained"

    path = tmp_path / "findings.arrow"
    await world.objects.fetch(audit.findings_key, path)
    found = [pair for pair in read_finding_lines(path) if pair[1] != "stop_not_trained"]
    assert found == [(line, code) for line, (code, _) in FAULTS.items() if not code.startswith("validation_")]
