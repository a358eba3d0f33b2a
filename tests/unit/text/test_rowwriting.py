"""A row that is written says what it was parsed from."""

import json
from pathlib import Path

import pytest

from lathe.text.decoding import decode_json
from lathe.text.formats import METHOD_FORMATS
from lathe.text.rows import parse_line, parse_row
from lathe.text.rowwriting import row_line

TRAINED = {each for known in METHOD_FORMATS.values() for each in known}
FILES = sorted((Path(__file__).parents[2] / "fixtures/formats").glob("*.jsonl"))


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_rows_of_every_layout_come_back(file: Path) -> None:
    for line in file.read_bytes().splitlines():
        row = parse_line(line)
        if row.format not in TRAINED:
            continue
        written = row_line(row, decode_json(line))
        again = parse_line(written)
        assert (again.format, again.parts) == (row.format, row.parts)
        assert row_line(again, decode_json(written)) == written


def test_there_are_files_of_every_format() -> None:
    found = {parse_line(line).format for file in FILES for line in file.read_bytes().splitlines()}
    assert found >= TRAINED


def test_weights_tools_and_keys_that_are_not_looked_at_stay() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    tools = [{"type": "function", "function": {"name": "add"}}]
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "tool_calls": [call], "weight": 0},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "assistant", "content": "2"},
    ]
    data = {"messages": messages, "tools": tools, "parallel_tool_calls": False}
    assert json.loads(row_line(parse_row(data), data)) == data
    alpaca = {"instruction": "Say hi.", "output": "hi", "id": 7, "text": "Say hi. hi"}
    assert json.loads(row_line(parse_row(alpaca), alpaca)) == {
        "conversations": [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "hi"}],
        "id": 7,
    }
