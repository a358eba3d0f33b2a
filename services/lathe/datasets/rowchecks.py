"""What the rows of an upload must be, by its purpose."""

from __future__ import annotations

from typing import Protocol

from lathe.datasets.model import Report, report_of, training_report, whole_file
from lathe.text.decoding import decode_json
from lathe.text.errors import RowError
from lathe.text.findings import Finding, Tally
from lathe.text.jsonl import LineSplitter
from lathe.text.jsonl import Validator as RowValidator


class RowCheck(Protocol):
    """Is fed a file in chunks; `report` after the last one."""

    def feed(self, chunk: bytes) -> None: ...

    def report(self) -> Report: ...


class TrainingRows:
    """Purpose fine-tune: every line a training example, all of one format."""

    def __init__(self) -> None:
        self._validator = RowValidator()

    def feed(self, chunk: bytes) -> None:
        self._validator.feed(chunk)

    def report(self) -> Report:
        return training_report(self._validator.finish())


class ObjectRows:
    """Purpose evals and batch: every line a JSON object."""

    def __init__(self) -> None:
        self._splitter = LineSplitter()
        self._rows = 0
        self._tally = Tally()

    def feed(self, chunk: bytes) -> None:
        for line in self._splitter.feed(chunk):
            self._check(line.number, line.data, line.too_long)

    def report(self) -> Report:
        for line in self._splitter.finish():
            self._check(line.number, line.data, line.too_long)
        if not self._rows:
            self._tally.add(
                Finding(0, "", "empty_file", "The file has no line; it must have one JSON object a line.")
            )
        return report_of(self._rows, self._tally)

    def _check(self, number: int, data: bytes, too_long: bool) -> None:
        self._rows += 1
        try:
            if too_long:
                raise RowError("", "line_too_long", "the line is too long")
            if not isinstance(decode_json(data), dict):
                raise RowError("", "invalid_json", "the line must be one JSON object")
        except RowError as error:
            self._tally.add(Finding(number, error.field, error.code, error.detail))


class AnyBytes:
    """Other purposes: only an empty file is refused."""

    def __init__(self) -> None:
        self._empty = True

    def feed(self, chunk: bytes) -> None:
        self._empty = self._empty and not chunk

    def report(self) -> Report:
        return whole_file("empty_file", "The file is empty.") if self._empty else Report()


def row_check(purpose: str) -> RowCheck:
    """What the rows of a file of this purpose must be."""
    if purpose == "fine-tune":
        return TrainingRows()
    return ObjectRows() if purpose in ("evals", "batch") else AnyBytes()
