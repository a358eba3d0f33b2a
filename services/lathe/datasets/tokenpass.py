"""One pass over a dataset: rows in, a token object and a report out. Synchronous and alone in its thread."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lathe.datasets.model import AuditResult, Report, report_of
from lathe.text.arrow import TokenRow, TokenWriter
from lathe.text.errors import RowError
from lathe.text.findings import Finding, Tally
from lathe.text.formats import RowFormat
from lathe.text.jsonl import Line, LineSplitter
from lathe.text.render import RenderOptions
from lathe.text.rows import TrainingRow, parse_line
from lathe.text.sequences import Tokenised, tokenise_rows
from lathe.text.tokenizer import Tokenizer

# Tokenised together, whichever comes first: enough for the tokenizer's own threads, little enough to keep memory flat
# (measured: some 700 bytes a token at the peak). A line is tokenised whole, so that a long one may still take more.
BATCH_ROWS = 64
BATCH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """result.sha256 is empty when there is nothing to train from; the report then says why."""

    result: AuditResult
    report: Report


class TokenPass:
    """Is fed a dataset's bytes in chunks; every row is rendered and tokenised once.

    now: what a template that writes the date reads; the same for all rows and for every repetition.
    """

    def __init__(
        self, tokenizer: Tokenizer, options: RenderOptions, writer: TokenWriter, now: datetime
    ) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._writer = writer
        self._now = now
        self._splitter = LineSplitter()
        self._pending: list[tuple[int, TrainingRow]] = []
        self._pending_bytes = 0
        self._tally = Tally()
        self._format = RowFormat.CHAT
        self._examples = self._rows = self._tokens = self._trained = self._truncated = self._longest = 0

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the file."""
        for line in self._splitter.feed(chunk):
            self._take(line)

    def finish(self) -> Outcome:
        """Call once, after the last chunk and before the writer is closed. The result has no sha256 yet."""
        for line in self._splitter.finish():
            self._take(line)
        self._render()
        if not self._examples and not self._tally.has_errors:
            self._tally.add(Finding(0, "", "empty_file", "The file has no example."))
        report = report_of(self._examples, self._tally, self._format)
        result = AuditResult(
            rows=self._rows,
            tokens=self._tokens,
            trained_tokens=self._trained,
            truncated_rows=self._truncated,
            max_row_tokens=self._longest,
        )
        return Outcome(result, report)

    @property
    def has_errors(self) -> bool:
        """Whether a row cannot be trained on."""
        return self._tally.has_errors

    def _take(self, line: Line) -> None:
        try:
            if line.too_long:
                raise RowError("", "line_too_long", "the line is too long")
            row = parse_line(line.data)
            self._format = row.format
            self._pending.append((line.number, row))
            self._pending_bytes += len(line.data)
        except RowError as error:
            self._error(line.number, error)
        if len(self._pending) == BATCH_ROWS or self._pending_bytes >= BATCH_BYTES:
            self._render()

    def _render(self) -> None:
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        if not pending:
            return
        found = tokenise_rows(self._tokenizer, [row for _, row in pending], self._options, now=self._now)
        for (line, _), row in zip(pending, found, strict=True):
            if isinstance(row, RowError):
                self._error(line, row)
            else:
                self._keep(line, row)

    def _keep(self, line: int, row: Tokenised) -> None:
        self._examples += 1
        self._rows += row.rows
        for role, example in row.sequences:
            self._tokens += len(example.tokens)
            self._trained += example.trained_tokens
            self._longest = max(self._longest, len(example.tokens))
            self._writer.write(TokenRow(example.tokens, example.mask, line, role))
        if row.truncated:
            self._truncated += 1
        note = _shortened(row, self._options.context_limit)
        if note:
            field = "messages" if self._format is RowFormat.CHAT else ""
            self._tally.add(Finding(line, field, "truncated" if row.truncated else "split", note))

    def _error(self, line: int, error: RowError) -> None:
        self._tally.add(Finding(line, error.field, error.code, error.detail))


def _shortened(row: Tokenised, limit: int) -> str:
    """What became of a row that is longer than the limit; empty for any other."""
    if row.was_split:
        return f"the text is longer than the limit of {limit} tokens; it was split into {row.rows} rows"
    return "; ".join(
        f"the {role.name.lower() + ' output' if len(row.sequences) > 1 else 'row'} has "
        f"{len(example.tokens) + example.truncated} tokens; the last {example.truncated} were cut at the limit of "
        f"{limit}"
        for role, example in row.sequences
        if example.truncated
    )


def file_sha256(path: Path) -> str:
    """Lower-case hex of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
