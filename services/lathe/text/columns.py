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
_STRUCTURED = frozenset(
    {"messages", "conversations", "conversation", "tools", "functions", "history", "preferred_output",
     "preferred_completion", "non_preferred_output", "non_preferred_completion"}
)  # fmt: skip
_TEXT_OR_TURNS = frozenset({"prompt", "completion", "chosen", "rejected", "input"})
_WORDS = {"true": True, "false": False}
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,18}\.?|[0-9]*\.[0-9]+)(?:e[+-]?[0-9]+)?", re.IGNORECASE)
_NO_NUMBER = re.compile(r"[+-]?(?:nan|inf(?:inity)?)", re.IGNORECASE)


def resolve_columns(columns: Mapping[str, str]) -> dict[str, str]:
    """Key of the row -> name of the column, with AutoTrain's names of settings (`text_column`, `prompt_text_column`,
    `rejected_text_column`) under those of rows. Raises RowError, whose field is the key."""
    compared = "rejected_text_column" in columns
    resolved: dict[str, str] = {}
    for given, column in columns.items():
        key = "chosen" if compared and given == "text_column" else _AUTOTRAIN.get(given, given)
        if key not in FIELDS:
            known = ", ".join(sorted([*FIELDS, *_AUTOTRAIN]))
            raise RowError(given, "unknown_column", f"is no key of a training row; known: {known}")
        if not column:
            raise RowError(given, "unknown_column", "needs the name of a column of the file")
        if key in resolved:
            raise RowError(given, "unknown_column", f"{key} is given twice")
        resolved[key] = column
    return resolved


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


def from_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose values have types: nulls go, and bytes under keys that mean nothing; JSON in a string becomes what it
    says. Raises RowError."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if _is_binary(value):
            if key in FIELDS:
                raise RowError(key, "data_type", "the column is binary; only text can be trained on")
        elif value is not None:
            found[key] = _parsed(key, _without_nulls(key, value))
    return found


def without_extras(row: dict[str, Any]) -> dict[str, Any]:
    """A conversation of a table without the columns that say nothing of it: tables have such columns, and rows of
    OpenAI's layout may not. Where the last word is not the assistant's, they are what a grader needs."""
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return row
    return {key: value for key, value in row.items() if key in FIELDS}


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
    return found


def _parsed(key: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if key in _STRUCTURED:
        return _json(key, value) if value.strip() else None
    if key in _TEXT_OR_TURNS and value.lstrip()[:1] in ("[", "{"):
        try:
            found = decode_json(value.encode())
        except RowError:
            return value
        return found if _is_turns(found) else value
    return value


def _json(key: str, text: str) -> Any:
    try:
        return decode_json(text.encode())
    except RowError as error:
        raise RowError(
            key, "invalid_json", f"the cell must be JSON (json.dumps, not the str of a list): {error.detail}"
        ) from None


def _is_turns(value: object) -> bool:
    if isinstance(value, dict):
        return "messages" in value
    return isinstance(value, list) and all(isinstance(turn, dict) and "role" in turn for turn in value)


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
