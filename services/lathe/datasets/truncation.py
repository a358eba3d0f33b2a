"""Datasets whose rows fit into a limit: the pass over a file that makes them, and what it needs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable
from dataclasses import dataclass
from datetime import datetime

from lathe.common.errors import NotFound
from lathe.datasets.blobs import blob_chunks
from lathe.datasets.operations import Truncate, findings_of
from lathe.datasets.rowindexes import RowIndexes
from lathe.datasets.service import render_options
from lathe.datasets.tokenizers import TokenizerCache
from lathe.text.decoding import decode_json
from lathe.text.errors import RowError
from lathe.text.jsonl import Line, LineSplitter
from lathe.text.render import RenderOptions
from lathe.text.rows import parse_row
from lathe.text.rowwriting import row_line
from lathe.text.shortening import Policy, excess_tokens, shorten
from lathe.text.template import TRAINING_DATE
from lathe.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class RowLimit:
    """How long rows may be, as which model reads them, and what becomes of those that are longer.

    keep_unfit: whether a row that cannot be made to fit stays as it is; else it is dropped. now: what a template that
    writes the date reads.
    """

    tokenizer: Tokenizer
    options: RenderOptions
    now: datetime
    policy: Policy
    keep_unfit: bool


class Truncation:
    """Is fed a file in chunks and gives its rows, each ended by a newline: those that fit with their bytes, the others
    as the policy has it. It counts: rows of the file; shortened, dropped, and unfit ones that stay.

    long_lines: the only ones that may be too long.
    """

    def __init__(self, limit: RowLimit, long_lines: Collection[int]) -> None:
        self._limit = limit
        self._long_lines = long_lines
        self._splitter = LineSplitter()
        self.rows = 0
        self.shortened = 0
        self.dropped = 0
        self.unfit = 0

    def feed(self, chunk: bytes) -> bytes:
        """The rows that this chunk ends."""
        return self._take(self._splitter.feed(chunk))

    def finish(self) -> bytes:
        """Call once, after the last chunk."""
        return self._take(self._splitter.finish())

    def _take(self, lines: Iterable[Line]) -> bytes:
        kept = []
        for line in lines:
            self.rows += 1
            data = self._fitted(line.data) if line.number in self._long_lines else line.data
            if data is not None:
                kept.append(data + b"\n")
        return b"".join(kept)

    def _fitted(self, line: bytes) -> bytes | None:
        """The line as it stands where it fits, or where its length is not what is wrong with it; None to drop it."""
        limit = self._limit
        try:
            data = decode_json(line)
            row = parse_row(data)
            excess = excess_tokens(limit.tokenizer, row, limit.options, limit.now)
        except RowError:
            return line
        if excess <= 0:
            return line
        made = shorten(limit.tokenizer, row, limit.options, limit.policy, excess=excess, now=limit.now)
        if made is not None:
            self.shortened += 1
            return row_line(made, data)
        if limit.keep_unfit:
            self.unfit += 1
            return line
        self.dropped += 1
        return None


@dataclass(frozen=True, slots=True)
class Truncations:
    """Makes truncations from what audits keep."""

    indexes: RowIndexes
    tokenizers: TokenizerCache

    async def begun(self, operation: Truncate) -> Truncation:
        """A pass for a settled operation. Raises NotFound if its audit or the base model is gone, Unavailable."""
        key = operation.audit.key
        task = await self.indexes.store.audit_task(key)
        if task is None:
            raise NotFound("The audit for the limit has gone.")
        long_lines = await self.indexes.found_lines(key, findings_of(operation))
        tokenizer = await self.tokenizers.get(task.files)
        limit = RowLimit(
            tokenizer,
            render_options(task.options),
            TRAINING_DATE,
            Policy(operation.policy),
            operation.keep_unfit,
        )
        return Truncation(limit, long_lines)

    async def rows(self, truncation: Truncation, sha256: str) -> AsyncIterator[bytes]:
        """What it gives of a file. Raises NotFound if the file is gone, DataLoss if it is damaged, Unavailable."""
        async for chunk in blob_chunks(self.indexes.objects, sha256, 256 * 1024):
            if rows := await asyncio.to_thread(truncation.feed, chunk):
                yield rows
        if rows := await asyncio.to_thread(truncation.finish):
            yield rows
