"""What two files have in common, row by row, whatever the order."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa  # type: ignore[import-untyped]

from lathe.text.rowindex import RowIndex

MAX_FIRST = 20
_NONE = -1


@dataclass(frozen=True, slots=True)
class Rows:
    """How many, and the first of them as (line in the one file, line in the other); 0 where a file has it not."""

    count: int
    first: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """only_in_first, only_in_second and in_both share out the rows of both files: the n-th of equal rows in the one
    goes with the n-th in the other. moved: of those in both the fewest whose move explains the other order."""

    only_in_first: Rows
    only_in_second: Rows
    in_both: Rows
    moved: Rows


def difference(first: RowIndex, second: RowIndex) -> Difference:
    """Compare two files. Memory: some 100 bytes a row."""
    partner = _partners(*_numbered(first, second))
    matched = array("i", (position for position, other in enumerate(partner) if other != _NONE))
    taken = bytearray(len(second))
    for position in matched:
        taken[partner[position]] = 1
    staying = longest_increasing(array("i", (partner[position] for position in matched)))
    moved = (position for n, position in enumerate(matched) if not staying[n])

    def lines(position: int) -> tuple[int, int]:
        return first.entry(position).line, second.entry(partner[position]).line

    alone = (position for position, other in enumerate(partner) if other == _NONE)
    new = (position for position, found in enumerate(taken) if not found)
    return Difference(
        Rows(len(first) - len(matched), tuple((first.entry(n).line, 0) for n in islice(alone, MAX_FIRST))),
        Rows(len(second) - len(matched), tuple((0, second.entry(n).line) for n in islice(new, MAX_FIRST))),
        Rows(len(matched), tuple(map(lines, matched[:MAX_FIRST]))),
        Rows(staying.count(0), tuple(map(lines, islice(moved, MAX_FIRST)))),
    )


def longest_increasing(values: Sequence[int]) -> bytearray:
    """One byte a value, 1 for those of a longest strictly increasing subsequence (patience sorting, n log n)."""
    # Of each length so far: the smallest last value, and where it is. `before`: what comes before a value.
    ends, positions = array("i"), array("i")
    before = array("i")
    for position, value in enumerate(values):
        length = len(ends) if not ends or value > ends[-1] else bisect_left(ends, value)
        before.append(positions[length - 1] if length else _NONE)
        if length == len(ends):
            ends.append(value)
            positions.append(position)
        else:
            ends[length], positions[length] = value, position
    chosen = bytearray(len(values))
    position = positions[-1] if positions else _NONE
    while position != _NONE:
        chosen[position] = 1
        position = before[position]
    return chosen


def _numbered(first: RowIndex, second: RowIndex) -> tuple[array[int], array[int]]:
    """For each row of either file a number, the same for equal rows."""
    both = pa.chunked_array([*first.digests.chunks, *second.digests.chunks], type=pa.binary(16))
    numbers = array("i")
    for chunk in both.dictionary_encode().chunks:
        numbers.extend(chunk.indices.to_pylist())
    return numbers[: len(first)], numbers[len(first) :]


def _partners(first: Sequence[int], second: Sequence[int]) -> array[int]:
    """For each row of the first file the position of its equal in the second, or -1."""
    # Of each number the next row of the second file that has no partner yet, and for each row the one after it.
    nearest = array("i", [_NONE]) * (max(max(first, default=0), max(second, default=0)) + 1)
    following = array("i", [_NONE]) * len(second)
    for position in range(len(second) - 1, -1, -1):
        following[position] = nearest[second[position]]
        nearest[second[position]] = position
    partner = array("i")
    for number in first:
        found = nearest[number]
        partner.append(found)
        if found != _NONE:
            nearest[number] = following[found]
    return partner
