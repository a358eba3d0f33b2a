"""One line's JSON, strictly: what is not text or not a number is refused, and so is what nests without end."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

import msgspec

from lathe.text.errors import RowError

MAX_DEPTH = 100
"""How deep a value may nest that is kept as it is: a tool's schema, the arguments of a call."""


def decode_json(line: bytes) -> Any:
    """The JSON value of one line. Of equal keys in one object the last wins.

    Raises RowError with code invalid_utf8 (also for half a surrogate pair, which JSON can write but which is no text)
    or invalid_json (also for NaN and for numbers that no float holds).
    """
    try:
        return msgspec.json.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # The standard library's decoder is slower and says better what is wrong; where the two differ, it is right.
        return _decode_exactly(line)


def decode_string(text: str, path: str) -> Any:
    """The JSON that a string of a row says, of tools or of a call. Raises RowError with code invalid_tools."""
    try:
        return decode_json(text.encode())
    except RowError as error:
        raise RowError(path, "invalid_tools", f"must be JSON in a string: {error.detail}") from None


def _decode_exactly(line: bytes) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError("", "invalid_utf8", f"byte {error.start + 1} of the line is not UTF-8") from None
    try:
        value = json.loads(text, parse_constant=refuse_constant, parse_float=finite)
        check_unicode(value, "")
    except json.JSONDecodeError as error:
        raise RowError("", "invalid_json", f"the line is not JSON: {_why(error, text)}") from None
    except RowError:
        raise
    except (ValueError, RecursionError) as error:
        raise RowError("", "invalid_json", f"the line is not JSON: {unreadable_value(error)}") from None
    return value


def unreadable_value(error: ValueError | RecursionError) -> str:
    """Why a decoder took a value for none, where it is not the syntax, for people who do not know the decoder."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    said = str(error)
    return "a number has too many digits" if said.startswith("Exceeds the limit") else said


def _why(error: json.JSONDecodeError, text: str) -> str:
    """The decoder's words, or better ones for what people write who have written JSON, but not JSONL."""
    if text.strip() in ("{", "["):
        return "what begins here ends on another line; write each object on one line"
    if text[error.pos :].strip() == ",":
        return "a comma follows the object; write nothing between the lines"
    if error.msg == "Extra data" and text[: error.pos].endswith("\r"):
        return "it has lines that end with CR alone; end each with LF"
    said = error.msg.removesuffix(" at")
    if error.pos >= len(text):
        return f"{said} at its end"
    return f"{said} at character {error.pos + 1} of {len(text)}"


def refuse_constant(name: str) -> NoReturn:
    """For NaN and the infinities. Raises ValueError."""
    raise ValueError(f"{name} is not a JSON number")


def finite(text: str) -> float:
    """The number. Raises ValueError if no float holds it."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def check_unicode(value: object, path: str) -> None:
    """Refuses lone surrogates: JSON can write them (`\\ud800`), but they are no text and have no UTF-8.

    Raises RowError, and RecursionError for what nests too deeply.
    """
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise RowError(path, "invalid_utf8", "has half a surrogate pair, which is not text") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            check_unicode(key, path)
            check_unicode(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_unicode(item, f"{path}[{index}]")


def check_depth(value: object, path: str) -> None:
    """Refuses a value that nests deeper than MAX_DEPTH: what renders it would run out of stack. Raises RowError."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise RowError(path, "too_deep", f"nests deeper than {MAX_DEPTH} levels")


def type_name(value: object) -> str:
    """A JSON value's type in words: "a list"."""
    if value is None:
        return "null"
    names: dict[type, str] = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
