"""The rows of a JSON array, and of JSONL under other names. Memory is bounded by the longest row that may be
(MAX_LINE_BYTES)."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lathe.text.columns import Columns, from_values
from lathe.text.decoding import check_unicode, decode_json, finite, refuse_constant, unreadable_value
from lathe.text.errors import RowError
from lathe.text.jsonl import MAX_LINE_BYTES, Line, LineSplitter
from lathe.text.records import CHUNK_BYTES, Record, record_of

# Of what JSON has beside strings: `-Infinity`, an escaped pair of surrogates.
_LONGEST_WORD = 16


def read_jsonl(path: Path, columns: Columns) -> Iterator[Record]:
    """The rows of lines of JSON, blank ones left out."""

    def made(line: Line) -> Mapping[str, Any]:
        if line.too_long:
            raise RowError("", "line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes")
        return _object(decode_json(line.data), columns)

    splitter = LineSplitter()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            for line in splitter.feed(chunk):
                yield record_of(f"line {line.number}", made, line)
    for line in splitter.finish():
        yield record_of(f"line {line.number}", made, line)


def _object(value: object, columns: Columns) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RowError("", "data_type", "a row must be an object of keys and values")
    return from_values(columns.renamed(value), table=False)


def read_json(path: Path, columns: Columns) -> Iterator[Record]:
    """The elements of one JSON array; of a file that does not begin with one its lines. The last record says where it
    cannot be read any further."""

    def made(value: object) -> Mapping[str, Any]:
        check_unicode(value, "")
        return _object(value, columns)

    with path.open("rb") as file:
        first = file.read(CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        if first != b"[":
            yield from read_jsonl(path, columns)
            return
        file.seek(0)
        elements = _Elements(file)
        try:
            for number, element in enumerate(elements, 1):
                yield record_of(f"element {number}", made, element)
        except RowError as error:
            yield Record(f"line {elements.line}", error=error, last=True)


class _Elements:
    """The elements of one JSON array, as they are read. Raises RowError; `line` is then where in the file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._scan = json.JSONDecoder(parse_constant=refuse_constant, parse_float=finite).raw_decode
        self._text = ""
        self._place = 0
        self._lines = 0
        self._ended = False
        self._broken = False
        self.line = 1

    def __iter__(self) -> Iterator[Any]:
        if self._token() != "[":
            raise self._wrong("a list was expected")
        self._place += 1
        if self._token() == "]":
            self._place += 1
        else:
            while True:
                yield self._element()
                token = self._token()
                self._place += 1
                if token == "]":
                    break
                if token != ",":
                    raise self._wrong("a comma or the end of the list was expected")
        if self._token():
            raise self._wrong("there is something behind the list")

    def _token(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            while self._place < len(self._text):
                if self._text[self._place] not in " \t\r\n":
                    return self._text[self._place]
                self._place += 1
            if not self._more():
                return ""

    def _element(self) -> Any:
        self._token()
        while True:
            try:
                value, end = self._scan(self._text, self._place)
            except json.JSONDecodeError as error:
                # It may only be cut where the text read so far ends.
                cut = error.pos > len(self._text) - _LONGEST_WORD or error.msg.startswith(
                    "Unterminated string"
                )
                if not cut or not self._more():
                    raise self._wrong(error.msg.removesuffix(" at"), at=error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self._wrong(unreadable_value(error)) from None
            else:
                # A number may go on.
                if end < len(self._text) or not isinstance(value, int | float) or not self._more():
                    self._place = end
                    return value

    def _more(self) -> bool:
        """Read on, twice as much of an element that is not whole yet; False at the end of the file."""
        if self._ended:
            return False
        if self._broken:
            raise self._wrong("what follows is not UTF-8", "invalid_utf8", at=len(self._text))
        self._lines += self._text.count("\n", 0, self._place)
        self._text = self._text[self._place :]
        self._place = 0
        if len(self._text) > MAX_LINE_BYTES:
            cause = f"an element is longer than {MAX_LINE_BYTES} bytes, or is not JSON"
            raise self._wrong(cause, "line_too_long")
        data = self._file.read(max(CHUNK_BYTES, len(self._text)))
        try:
            self._text += self._decode(data, not data)
        except UnicodeDecodeError as error:
            # The elements before it are good ones.
            self._text += error.object[: error.start].decode()
            self._broken = True
        self._ended = not data
        return True if self._broken else bool(data)

    def _wrong(self, cause: str, code: str = "invalid_json", *, at: int | None = None) -> RowError:
        self.line = self._lines + self._text.count("\n", 0, self._place if at is None else at) + 1
        return RowError("", code, f"the file is not one JSON array of objects: {cause}")
