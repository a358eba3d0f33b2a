"""The values by which a split is stratified: what is at a path of each row, as a number."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from lathe.common.errors import FieldViolation, InvalidArgument
from lathe.text.rows import Plain, TrainingRow, parse_line

MAX_STRATA = 1000
_POSITION = re.compile(r"-?[0-9]{1,9}\]")


class Strata:
    """Numbers for the values that rows are stratified by, in the order in which they first occur."""

    def __init__(self, field: str) -> None:
        """Raises InvalidArgument for a field that is no path."""
        self._path = _path(field)
        self._field = field
        # By digest: a value may be as long as a row.
        self._numbers: dict[bytes, int] = {}
        self._has_value = False
        self.rows = array("H")

    def add(self, line: bytes) -> None:
        """The next row. Raises InvalidArgument for too many values."""
        value = _value(line, self._path)
        self._has_value = self._has_value or value is not None
        digest = blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()
        number = self._numbers.setdefault(digest, len(self._numbers))
        if number >= MAX_STRATA:
            raise _invalid(
                f"{self._field} has more than {MAX_STRATA} different values; take a field with few"
            )
        self.rows.append(number)

    def finish(self) -> array[int]:
        """Each row's stratum. Raises InvalidArgument where no row has a value: the field is misspelt."""
        if self.rows and not self._has_value:
            raise _invalid(f"no row has {self._field}; write answer or a path in the rows")
        return self.rows


def check_path(field: str) -> None:
    """Raises InvalidArgument for a field that is no path."""
    _path(field)


def _path(field: str) -> list[str | int]:
    """`messages[0].content` as keys and positions."""
    path: list[str | int] = []
    for part in field.split("."):
        key, *positions = part.split("[")
        if key:
            path.append(key)
        for position in positions:
            if not _POSITION.fullmatch(position):
                raise _invalid(f"{field!r} is no path; write messages[0].content, label or answer")
            path.append(int(position[:-1]))
    if not path:
        raise _invalid("the path is empty")
    return path


def _value(line: bytes, path: Sequence[str | int]) -> Any:
    """What is at a path of a row; None where nothing is."""
    if path[0] != "answer":
        return _value_at(json.loads(line), path)
    answer = _answer(parse_line(line))
    return _value_at(_as_json(answer), path[1:]) if len(path) > 1 else answer


def _value_at(value: Any, path: Sequence[str | int]) -> Any:
    for step in path:
        if isinstance(step, str) and isinstance(value, dict):
            value = value.get(step)
        elif isinstance(step, int) and isinstance(value, list) and -len(value) <= step < len(value):
            value = value[step]
        else:
            return None
    return value


def _answer(row: TrainingRow) -> str:
    """The last text that a row teaches, whatever its format; of a pair the preferred one."""
    content = row.parts[0].content
    if isinstance(content, Plain):
        return content.completion
    answers = (message for message in reversed(content.messages) if message["role"] == "assistant")
    return str(next(answers, {}).get("content") or "")


def _as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _invalid(cause: str) -> InvalidArgument:
    field = "operation.split.stratify_by"
    message = f"{field}: {cause}."
    return InvalidArgument(message, violations=[FieldViolation(field, message)])
