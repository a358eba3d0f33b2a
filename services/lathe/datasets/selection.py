"""Which rows of one dataset an operation keeps, worked out from its row index and, to stratify, its bytes.

It depends on the rows alone: the same operation on the same bytes keeps the same rows, on every machine and in every
version (the hashes of `tickets` are part of the contract).
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from lathe.datasets.operations import (
    Choosing,
    Dedupe,
    Drop,
    Sample,
    Split,
    held_out_rows,
    invalid_operation,
    parts_of,
)
from lathe.datasets.strata import Strata
from lathe.text.jsonl import Line, LineSplitter
from lathe.text.rowindex import RowIndex

# One byte a row: the number of the operation's part that takes it, or DROPPED.
Selection = bytearray
DROPPED = 255


def select(
    operation: Choosing,
    index: RowIndex,
    strata: array[int] | None = None,
    found: Collection[int] = frozenset(),
) -> Selection:
    """Which part takes each row. strata: each row's stratum, for a split that is stratified. found: the lines with a
    finding that the operation leaves out.

    Memory: some 50 bytes a row. Raises InvalidArgument for an operation that this dataset has not rows enough for.
    """
    rows = len(index)
    match operation:
        case Split(seed, fraction, count, _):
            wanted = held_out_rows(rows, fraction, count)
            drawn = tickets(seed, _digests(index))
            groups = strata if strata is not None else array("H", bytes(2 * rows))
            return choose_held_out(_ascending(drawn), drawn, groups, wanted)
        case Sample(seed, count):
            drawn = tickets(seed, (position.to_bytes(8, "big") for position in range(rows)))
            return _only(_ascending(drawn)[:count], rows)
        case Dedupe():
            return _without(_first_of_equals(index), index, found)
        case Drop(lines):
            missing = next((line for line in lines if index.at_line(line) is None), None)
            if missing is not None:
                raise invalid_operation("drop.lines", f"the dataset has no row on line {missing}")
            return _without(Selection(rows), index, {*lines, *found})


def counts(operation: Choosing, selection: Selection) -> list[int]:
    """Rows of each of the operation's parts."""
    return [selection.count(part) for part in range(len(parts_of(operation)))]


def shares(sizes: Sequence[int], wanted: int) -> list[int]:
    """`wanted` rows dealt out to groups of these sizes in proportion (largest remainders; ties to the earlier)."""
    total = sum(sizes)
    exact = [size * wanted for size in sizes]
    dealt = [value // total for value in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda n: (-(exact[n] % total), n))
    for number in by_remainder[: wanted - sum(dealt)]:
        dealt[number] += 1
    return dealt


def tickets(seed: int, keys: Iterable[bytes]) -> array[int]:
    """A random number (64 bits) for each key, the same for equal keys: its BLAKE2b keyed with the seed."""
    secret = seed.to_bytes(8, "big", signed=True)
    drawn = array("Q")
    for key in keys:
        drawn.append(int.from_bytes(blake2b(key, digest_size=8, key=secret).digest(), "big"))
    return drawn


def choose_held_out(
    order: Sequence[int], drawn: Sequence[int], strata: Sequence[int], wanted: int
) -> bytearray:
    """One byte a row, 1 where it is held out.

    order: positions by ticket. drawn: each row's ticket. strata: each row's stratum. Rows of one ticket (equal rows)
    go together, with the stratum of the first of them; a set that does not fit into what its stratum has left stays
    out, so that never more than `wanted` rows are held out.
    """
    sizes = Counter(strata)
    numbers = sorted(sizes)
    room = dict(zip(numbers, shares([sizes[number] for number in numbers], wanted), strict=True))
    held_out = bytearray(len(strata))
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and drawn[order[end]] == drawn[order[start]]:
            end += 1
        stratum = strata[order[start]]
        if end - start <= room[stratum]:
            room[stratum] -= end - start
            for position in order[start:end]:
                held_out[position] = 1
        start = end
    return held_out


class StrataPass:
    """Is fed a dataset's bytes in chunks; `rows` has each row's stratum after `finish`."""

    def __init__(self, field: str) -> None:
        """Raises InvalidArgument for a field that is no path."""
        self._strata = Strata(field)
        self._splitter = LineSplitter()

    def feed(self, chunk: bytes) -> None:
        """Raises InvalidArgument for a field with too many values."""
        for line in self._splitter.feed(chunk):
            self._strata.add(line.data)

    def finish(self) -> array[int]:
        """Each row's stratum. Call once, after the last chunk. Raises InvalidArgument as `feed` does, and for a field
        that no row has."""
        for line in self._splitter.finish():
            self._strata.add(line.data)
        return self._strata.finish()


class Cut:
    """Is fed a dataset's bytes in chunks and gives one part of them: its rows as they stand there, in their order,
    each ended by a newline."""

    def __init__(self, selection: Selection, part: int) -> None:
        self._taken = (chosen == part for chosen in selection)
        self._splitter = LineSplitter()

    def feed(self, chunk: bytes) -> bytes:
        """What of the part this chunk ends."""
        return self._take(self._splitter.feed(chunk))

    def finish(self) -> bytes:
        """Call once, after the last chunk."""
        return self._take(self._splitter.finish())

    def _take(self, lines: Iterator[Line]) -> bytes:
        return b"".join(line.data + b"\n" for line in lines if next(self._taken))


def _digests(index: RowIndex) -> Iterator[bytes]:
    for chunk in index.digests.chunks:
        yield from chunk.to_pylist()


def _ascending(drawn: array[int]) -> Any:
    """Positions by ticket; of equal ones the earlier first."""
    tickets = pa.Array.from_buffers(pa.uint64(), len(drawn), [None, pa.py_buffer(drawn)])
    return memoryview(pc.array_sort_indices(tickets).buffers()[1]).cast("B").cast("Q")[: len(drawn)]


def _only(positions: Any, rows: int) -> Selection:
    selection = Selection([DROPPED]) * rows
    for position in positions:
        selection[position] = 0
    return selection


def _first_of_equals(index: RowIndex) -> Selection:
    """Sorted by digest, rows that are equal lie beside each other, in their order: the sort is a stable one."""
    halves = _digest_halves(index)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    repeats = np.ones(max(0, len(order) - 1), bool)
    for half in (0, 1):
        ordered = halves[order, half]
        repeats &= ordered[1:] == ordered[:-1]
    selection = np.zeros(len(order), np.uint8)
    selection[order[1:][repeats]] = DROPPED
    return Selection(selection.tobytes())


def _digest_halves(index: RowIndex) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The digests as two numbers a row."""
    halves = np.empty((len(index), 2), np.uint64)
    start = 0
    for chunk in index.digests.chunks:
        there = np.frombuffer(chunk.buffers()[1], np.uint64).reshape(-1, 2)
        halves[start : start + len(chunk)] = there[chunk.offset : chunk.offset + len(chunk)]
        start += len(chunk)
    return halves


def _without(selection: Selection, index: RowIndex, lines: Collection[int]) -> Selection:
    for position, line in enumerate(index.lines() if lines else ()):
        if line in lines:
            selection[position] = DROPPED
    return selection
