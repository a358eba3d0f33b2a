from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lathe.text.formats import RowFormat
from lathe.text.rows import parse_line

TICKETS = Path(__file__).parents[3] / "docs" / "examples" / "tickets"
FIELDS = ["customer", "order", "product", "issue", "wants", "needed_by"]


def rows(name: str) -> list[tuple[str, dict[str, Any]]]:
    """(message, ticket) of each row."""
    found = []
    for line in (TICKETS / name).read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        assert [message["role"] for message in messages] == ["system", "user", "assistant"]
        found.append((messages[1]["content"], json.loads(messages[2]["content"])))
    return found


def test_the_generator_writes_the_same_bytes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, TICKETS / "generate.py", "--out", tmp_path], check=True)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (TICKETS / name).read_bytes()


@pytest.mark.parametrize(("name", "count"), [("train.jsonl", 300), ("heldout.jsonl", 60)])
def test_every_ticket_follows_from_its_message(name: str, count: int) -> None:
    examples = rows(name)
    assert len(examples) == count
    for message, ticket in examples:
        assert list(ticket) == FIELDS
        assert ticket["customer"] in message
        assert ticket["product"] in message
        numbers = re.findall(r"fh[- ]?(\d{4})\b", message, re.IGNORECASE)
        assert [f"FH-{number}" for number in numbers] == ([ticket["order"]] if ticket["order"] else [])
        days = re.findall(r"\w+day\b", message)
        assert days == ([ticket["needed_by"]] if ticket["needed_by"] else [])
        assert ticket["issue"] in {"damaged", "wrong_item", "late", "missing_part", "billing"}
        assert ticket["wants"] in {"refund", "replacement", "callback", "advice"}


def test_no_held_out_message_or_ticket_is_in_the_training_data() -> None:
    train, heldout = rows("train.jsonl"), rows("heldout.jsonl")
    for part in (0, 1):
        seen = [row[part] for row in train]
        assert not [row for row in heldout if row[part] in seen]
    customers = {(ticket["customer"], ticket["product"]) for _, ticket in train}
    assert not customers & {(ticket["customer"], ticket["product"]) for _, ticket in heldout}


def test_the_instruction_names_every_field_and_value() -> None:
    text = (TICKETS / "instruction.txt").read_text(encoding="utf-8")
    for _, ticket in rows("train.jsonl"):
        assert f'"{ticket["issue"]}"' in text
        assert f'"{ticket["wants"]}"' in text
    assert [text.index(f'"{field}"') for field in FIELDS] == sorted(
        text.index(f'"{field}"') for field in FIELDS
    )


def test_a_preference_is_the_right_ticket_over_one_with_a_single_mistake(tmp_path: Path) -> None:
    subprocess.run([sys.executable, TICKETS / "preferences.py", "--out", tmp_path], check=True)
    for source, target in (
        ("train.jsonl", "preferences.jsonl"),
        ("heldout.jsonl", "preferences_heldout.jsonl"),
    ):
        lines = (tmp_path / target).read_text(encoding="utf-8").splitlines()
        examples = rows(source)
        assert len(lines) == len(examples)
        spoilt = set()
        for line, (message, ticket) in zip(lines, examples, strict=True):
            pair = parse_line(line.encode())
            assert pair.format is RowFormat.PREFERENCE
            row = json.loads(line)
            assert row["input"]["messages"][-1]["content"] == message
            assert json.loads(row["preferred_output"][0]["content"]) == ticket
            wrong = json.loads(row["non_preferred_output"][0]["content"])
            (field,) = [field for field in FIELDS if wrong[field] != ticket[field]]
            assert list(wrong) == FIELDS
            spoilt.add(field)
        assert spoilt == set(FIELDS)
