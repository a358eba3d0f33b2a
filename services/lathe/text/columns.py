"""Which column of a table is which key of a training row, and what the text of a cell says."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lathe.text.decoding import decode_json
from lathe.text.errors import RowError
from lathe.text.parts import MEANINGFUL

FIELDS = MEANINGFUL | {
    "anchor", "positive", "negative", "sentence", "sentence1", "sentence2", "sentence_A", "sentence_B", "text1",
    "text2", "premise", "hypothesis", "score", "similarity",
}  # fmt: skip
"""The keys of training rows."""
_AUTOTRAIN = {"text_column": "text", "prompt_text_column": "prompt", "rejected_text_column": "rejected"}
_CONVERSATIONS = frozenset({"messages", "conversations", "conversation"})
_OUTPUTS = frozenset(
    {"preferred_output", "preferred_completion", "non_preferred_output", "non_preferred_completion"}
)
_SAID = frozenset({"content", "tool_calls", "function_call"})
# Texts, or lists of messages: both of them, if a row has both.
_ALIKE = (("prompt", "completion"), ("chosen", "rejected"))
_STRUCTURED = _CONVERSATIONS | _OUTPUTS | {"tools", "functions", "history"}
_WORDS = {"true": True, "false": False}
# Where digits would be lost (a zero before them, too many of them), it is a text: a code of its own.
_INTEGER = re.compile(r"[+-]?(?:0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(
    rf"(?:{_INTEGER.pattern}\.?|[+-]?(?:0|[1-9][0-9]*)?\.[0-9]+)(?:e[+-]?[0-9]+)?", re.IGNORECASE
)
_NO_NUMBER = re.compile(r"[+-]?(?:nan|inf(?:inity)?)", re.IGNORECASE)


def resolve_columns(columns: Mapping[str, str]) -> dict[str, str]:
    """Key of the row -> name of the column, with AutoTrain's names of settings (`text_column`, `prompt_text_column`,
    `rejected_text_column`) under those of rows. Raises RowError, whose field is the key."""
    resolved: dict[str, str] = {}
    for given, column in columns.items():
        key = _AUTOTRAIN.get(given, given)
        if given == "text_column":
            key = _autotrains_text(column, compared="rejected_text_column" in columns)
        if key not in FIELDS:
            known = ", ".join(sorted([*FIELDS, *_AUTOTRAIN]))
            raise RowError(given, "unknown_column", f"is no key of a training row; known: {known}")
        if not column:
            raise RowError(given, "unknown_column", "needs the name of a column of the file")
        if key in resolved:
            raise RowError(given, "unknown_column", f"{key} is given twice")
        resolved[key] = column
    return resolved


def _autotrains_text(column: str, *, compared: bool) -> str:
    """What AutoTrain's `text_column` is: beside a rejected one the better answer, and under a name for conversations
    they are."""
    name = column.strip().lower()
    return "chosen" if compared else name if name in _CONVERSATIONS else "text"


class Columns:
    """Makes training rows of a table's rows. columns: see resolve_columns; empty to take the columns as they are named,
    in whatever case, all of them."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._columns = resolve_columns(columns)

    def names(self, header: Sequence[str]) -> dict[str, str]:
        """Column -> key, of the columns that are used. Raises RowError for a mapped column that is not there."""
        if self._columns:
            for key, column in self._columns.items():
                if column not in header:
                    listed = ", ".join(map(repr, header[:50]))
                    raise RowError(
                        key, "missing_column", f"the file has no column {column!r}; its columns are {listed}"
                    )
            return {column: key for key, column in self._columns.items()}
        by_lower = {field.lower(): field for field in FIELDS}
        named = {column: by_lower.get(column.strip().lower(), column) for column in header if column.strip()}
        return named if len(set(named.values())) == len(named) else {column: column for column in named}

    def renamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row whose columns are not known beforehand: what is mapped, as far as it is there."""
        if not self._columns:
            return dict(row)
        return {key: row[column] for key, column in self._columns.items() if column in row}


def from_values(row: Mapping[str, Any], *, table: bool) -> dict[str, Any]:
    """A row whose values have types: keys that are null go, and bytes under keys that mean nothing; JSON in a string
    becomes what it says. table: whether null is all that its values can have for a key that is not there. Raises
    RowError."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if _is_binary(value):
            if key in FIELDS:
                raise RowError(key, "data_type", "the column is binary; only text can be trained on")
        elif value is not None:
            found[key] = _parsed(key, _without_nulls(key, value) if table else value)
    return _with_turns(found)


def without_extras(row: dict[str, Any]) -> dict[str, Any]:
    """A conversation of a table without the columns that say nothing of it: tables have such columns, and rows of
    OpenAI's layout may not; nor a prompt that is only what the user says first. Where the last word is not the
    assistant's, they are what a grader needs."""
    messages = row.get("messages")
    turns = messages if isinstance(messages, list) else []
    last = turns[-1] if turns else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return row
    known = {key: value for key, value in row.items() if key in FIELDS}
    if _first_asked(turns) == known.get("prompt"):
        known.pop("prompt", None)
    return known


def _first_asked(turns: list[Any]) -> object:
    said = (turn for turn in turns if isinstance(turn, dict) and turn.get("role") == "user")
    return next((turn.get("content") for turn in said), None)


def _is_binary(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_is_binary, value.values()))
    if isinstance(value, list):
        return any(map(_is_binary, value))
    return isinstance(value, bytes)


def from_cells(row: Mapping[str, str]) -> dict[str, Any]:
    """A row of texts, as a CSV file has them. Raises RowError."""
    texts = not row.keys().isdisjoint({"text", "sentence"})
    found: dict[str, Any] = {}
    for key, cell in row.items():
        if key in ("label", "score", "similarity"):
            verdict = not texts and "sentence1" not in row and "premise" not in row
            value = _scalar(key, cell.strip(), verdict=verdict)
        elif key == "parallel_tool_calls":
            value = _scalar(key, cell.strip(), verdict=True)
        else:
            value = _parsed(key, cell)
        if value is not None:
            found[key] = value
    return _with_turns(found)


def _parsed(key: str, value: Any) -> Any:
    if key in _STRUCTURED and isinstance(value, str):
        return _json(key, value) if value.strip() else None
    return value


def _with_turns(row: dict[str, Any]) -> dict[str, Any]:
    """The row, whose texts that are messages in JSON become them: an answer may be JSON too, and stays a text."""
    for names in _ALIKE:
        found = {name: _decoded(row[name], "[") for name in names if isinstance(row.get(name), str)}
        if all(map(_are_turns, found.values())):
            row.update(found)
    if isinstance(row.get("input"), str) and not row.keys().isdisjoint(_OUTPUTS):
        given = _decoded(row["input"], "{")
        if isinstance(given, dict):
            row["input"] = given
    return row


def _decoded(text: str, begin: str) -> Any:
    """What a text says that is JSON and begins so; None of any other."""
    if not text.lstrip().startswith(begin):
        return None
    try:
        return decode_json(text.encode())
    except RowError:
        return None


def _json(key: str, text: str) -> Any:
    try:
        return decode_json(text.encode())
    except RowError as error:
        raise RowError(
            key, "invalid_json", f"the cell must be JSON (json.dumps, not the str of a list): {error.detail}"
        ) from None


def _are_turns(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_turn, value))


def _is_turn(value: object) -> bool:
    return isinstance(value, dict) and "role" in value and not value.keys().isdisjoint(_SAID)


def _scalar(key: str, cell: str, *, verdict: bool) -> Any:
    if not cell:
        return None
    if cell.lower() in _WORDS:
        return _WORDS[cell.lower()]
    if verdict and cell in ("0", "1"):
        return cell == "1"
    if _INTEGER.fullmatch(cell):
        return int(cell)
    if _NO_NUMBER.fullmatch(cell):
        raise _not_finite(key, cell)
    if not _NUMBER.fullmatch(cell):
        return cell
    number = float(cell)
    if math.isinf(number):
        raise _not_finite(key, cell)
    return number


def _not_finite(key: str, number: object) -> RowError:
    return RowError(
        key, "data_type", f"{str(number)[:40]!r} is no number that can be kept; leave out the row"
    )


def _without_nulls(key: str, value: Any) -> Any:
    """A table gives every struct all keys that one of them has: null is what its row did not say. NaN and infinities,
    which JSON does not have, are null too where they mean nothing. Raises RowError where they do."""
    if isinstance(value, dict):
        return {name: _without_nulls(key, item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(key, item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        if key in FIELDS:
            raise _not_finite(key, value)
        return None
    return value
