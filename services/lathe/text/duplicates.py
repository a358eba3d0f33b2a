"""Rows that are the same, or nearly the same, as they are trained: found in token objects, within one or between two.

The same: equal tokens, masks and roles. Nearly the same: a Jaccard similarity of their sets of five-token shingles of
at least NEAR. Shingles that many rows share (a system prompt, the template's own words, a question asked of every
text) say nothing and are left out: without them two rows are compared by what they have of their own.

Candidates come from MinHash in one permutation (Li, Owen & Zhang, 2012) with empty bins filled from their neighbours
(Shrivastava & Li, 2014), in bands (Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, 3.4); each is checked on
the rows themselves. Of two rows with similarity 0.8 the bands miss 1 in 100, of two with 0.9 1 in 50,000.

Memory does not grow with the rows: what is kept of each, about 100 bytes, lies in unnamed mapped files beside the token
object, and rows are compared a part of the keys at a time (_PART_ROWS of them, some 60 bytes each).
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

NEAR = 0.8
_SHINGLE = 5
_BINS = 64
_BANDS = 12
_BAND_BINS = 5
# With fewer shingles of its own a row is too short to be nearly the same as another one.
_LEAST_SHINGLES = 8
# Shared is a shingle that so many of the first rows have, and at least so large a part of them.
_FIRST_ROWS = 1024
_SHARED_ROWS = 10
_SHARED_PART = 0.1
_SHARED_BITS = 20
# So many rows are sorted at once.
_PART_ROWS = 1 << 21
_WRITTEN = np.dtype([("line", np.int64), ("of", np.int64), ("similarity", np.float64)])
_WRITTEN_AT_ONCE = 1 << 14

Ints = np.ndarray[Any, np.dtype[np.int64]]
Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]
Shared = Bools
_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
# The golden ratio's, and splitmix64's finaliser (Steele, Lea & Flood, 2014).
_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True, slots=True)
class Duplicate:
    """line: of the row. of: the line that it repeats. similarity: 1.0 for rows that are the same."""

    line: int
    of: int
    similarity: float = 1.0

    @property
    def exact(self) -> bool:
        return self.similarity == 1.0


def find_duplicates(path: Path) -> Iterator[Duplicate]:
    """The rows of a token object that repeat an earlier one of it, by line. Each row is told once. Raises OSError if
    the disk has no room beside the object."""
    rows = _Rows(path)
    sketch = _Sketch.of(rows, rows.shared_shingles(), path.parent)
    same = _filled_column(path.parent, len(sketch))
    for repeats, leaders, _ in _equals(sketch.digests[0]):
        equal = sketch.digests[1][repeats] == sketch.digests[1][leaders]
        same[repeats[equal]] = leaders[equal]
        # Told already.
        sketch.sized[repeats[equal]] = False
    near = _Nearest(sketch, sketch, path.parent)
    for band in range(_BANDS):
        for repeats, leaders, previous in _equals(sketch.bands[band], sketch.sized):
            near.propose(repeats, leaders)
            near.propose(repeats, previous)
    yield from _found(sketch, sketch, same, near.rows)


def find_overlap(path: Path, other: Path) -> Iterator[Duplicate]:
    """The rows of one token object that repeat a row of another, by line; `of` is the other's line. Raises OSError if
    the disk has no room beside the object."""
    rows = _Rows(path)
    shared = rows.shared_shingles()
    mine = _Sketch.of(rows, shared, path.parent)
    theirs = _Sketch.of(_Rows(other), shared, path.parent)
    same = _filled_column(path.parent, len(mine))
    for hits, others in _matches(mine.digests[0], theirs.digests[0]):
        equal = mine.digests[1][hits] == theirs.digests[1][others]
        same[hits[equal]] = others[equal]
        mine.sized[hits[equal]] = False
    near = _Nearest(mine, theirs, path.parent)
    for band in range(_BANDS):
        for hits, others in _matches(mine.bands[band], theirs.bands[band], mine.sized, theirs.sized):
            near.propose(hits, others)
    yield from _found(mine, theirs, same, near.rows)


def write_duplicates(target: Path, path: Path, other: Path | None = None) -> None:
    """What is found within a token object, or of it in another, as a file: there may be as many as rows. Raises
    OSError."""
    found = find_duplicates(path) if other is None else find_overlap(path, other)
    with target.open("wb") as file:
        while some := [(item.line, item.of, item.similarity) for item in islice(found, _WRITTEN_AT_ONCE)]:
            file.write(np.array(some, _WRITTEN).tobytes())


def read_duplicates(target: Path) -> Iterator[Duplicate]:
    """What was written."""
    with target.open("rb") as file:
        while data := file.read(_WRITTEN_AT_ONCE * _WRITTEN.itemsize):
            for line, of, similarity in np.frombuffer(data, _WRITTEN).tolist():
                yield Duplicate(line, of, similarity)


def _found(mine: _Sketch, theirs: _Sketch, same: Ints, near: Ints) -> Iterator[Duplicate]:
    """same, near: for each of my rows the one of theirs that it repeats, or may; -1 for none."""
    for begin, end in _slices(len(mine)):
        for row in (begin + np.flatnonzero((same[begin:end] >= 0) | (near[begin:end] >= 0))).tolist():
            if same[row] >= 0:
                yield Duplicate(int(mine.lines[row]), int(theirs.lines[same[row]]))
                continue
            candidate = int(near[row])
            similarity = mine.similarity(row, theirs, candidate)
            if similarity >= NEAR:
                yield Duplicate(int(mine.lines[row]), int(theirs.lines[candidate]), min(similarity, 0.999))


@dataclass(frozen=True, slots=True)
class _Block:
    """Some rows of the dataset (each the sequences of one line). sequences: where each row's begin, and the end of the
    last; starts: the same in tokens."""

    lines: Ints
    tokens: Any
    mask: Any
    roles: Any
    sequences: Ints
    starts: Ints
    sizes: Ints


class _Rows:
    """The rows of a token object, a record batch at a time; a row whose sequences lie in two batches comes whole."""

    def __init__(self, path: Path) -> None:
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        counts = [self._reader.get_batch(n).num_rows for n in range(self._reader.num_record_batches)]
        self._starts = np.cumsum([0, *counts])

    @property
    def sequences(self) -> int:
        """How many there are; rows are as many at most."""
        return int(self._starts[-1])

    def tokens(self, begin: int, end: int) -> Any:
        """The ids of the sequences from one on up to another, one after the other."""
        pieces = []
        while begin < end:
            number = int(np.searchsorted(self._starts, begin, side="right")) - 1
            first, last = int(self._starts[number]), min(end, int(self._starts[number + 1]))
            column = self._reader.get_batch(number).column("tokens")
            offsets = column.offsets
            pieces.append(
                column.values.to_numpy()[offsets[begin - first].as_py() : offsets[last - first].as_py()]
            )
            begin = last
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def blocks(self) -> Iterator[_Block]:
        held: pa.Table | None = None
        for number in range(self._reader.num_record_batches):
            batch = self._reader.get_batch(number)
            whole = batch if held is None else _joined(held, batch)
            lines = whole.column("line").to_numpy()
            last = int(np.searchsorted(lines, lines[-1])) if len(lines) else 0
            if number + 1 < self._reader.num_record_batches:
                held = whole.slice(last)
                whole = whole.slice(0, last)
            if whole.num_rows:
                yield _block(whole)

    def shared_shingles(self) -> Shared:
        """Those that many of the first rows have, by their leading bits: a few others are taken for them, which costs
        nothing, since equal shingles share their fate."""
        seen: list[Hashes] = [np.empty(0, dtype=np.uint64)]
        rows = 0
        for block in self.blocks():
            hashes, owners = _shingles(block)
            hashes, owners = hashes[owners < _FIRST_ROWS - rows], owners[owners < _FIRST_ROWS - rows]
            # A row's lie side by side.
            for row in np.split(hashes, np.flatnonzero(np.diff(owners)) + 1):
                row.sort()
            again = (hashes[1:] == hashes[:-1]) & (owners[1:] == owners[:-1])
            seen.append(hashes[np.concatenate([[True], ~again])[: len(hashes)]])
            rows += len(block.lines)
            if rows >= _FIRST_ROWS:
                break
        values, counts = np.unique(np.concatenate(seen), return_counts=True)
        shared: Shared = np.zeros(1 << _SHARED_BITS, dtype=np.bool_)
        often = counts >= max(_SHARED_ROWS, _SHARED_PART * min(rows, _FIRST_ROWS))
        shared[values[often] >> np.uint64(64 - _SHARED_BITS)] = True
        return shared


@dataclass(frozen=True, slots=True)
class _Sketch:
    """What is kept of each row. digests: (2, rows) words. bands: (_BANDS, rows) keys. sized: rows that have enough
    shingles of their own. sequences: where each row's begin, and the end of the last."""

    source: _Rows
    shared: Shared
    lines: Ints
    sequences: Ints
    digests: Hashes
    bands: np.ndarray[Any, np.dtype[np.uint32]]
    sized: Bools

    @classmethod
    def of(cls, source: _Rows, shared: Shared, folder: Path) -> _Sketch:
        """folder: which has room for it. Raises OSError."""
        most = source.sequences
        lines, sequences = _column(folder, np.int64, most), _column(folder, np.int64, most + 1)
        digests, bands = _column(folder, np.uint64, 2, most), _column(folder, np.uint32, _BANDS, most)
        sized = _column(folder, np.bool_, most)
        rows = sequence = 0
        for block in source.blocks():
            hashes, owners = _own(*_shingles(block), shared)
            count = len(block.lines)
            place = slice(rows, rows + count)
            lines[place] = block.lines
            sequences[place] = sequence + block.sequences[:-1]
            digests[:, place] = np.frombuffer(b"".join(_digests(block)), np.uint64).reshape(count, 2).T
            bands[:, place] = _band_keys(hashes, owners, count).T
            sized[place] = np.bincount(owners, minlength=count) >= _LEAST_SHINGLES
            rows += count
            sequence += int(block.sequences[-1])
        sequences[rows] = sequence
        return cls(
            source,
            shared,
            lines[:rows],
            sequences[: rows + 1],
            digests[:, :rows],
            bands[:, :rows],
            sized[:rows],
        )

    def __len__(self) -> int:
        return len(self.lines)

    def own_shingles(self, row: int) -> Hashes:
        hashes = _hashes(self.source.tokens(int(self.sequences[row]), int(self.sequences[row + 1])))
        own, _ = _own(hashes, np.zeros(len(hashes), np.int64), self.shared)
        return np.unique(own)

    def similarity(self, row: int, other: _Sketch, candidate: int) -> float:
        """Jaccard's, of the two rows' own shingles."""
        mine, theirs = self.own_shingles(row), other.own_shingles(candidate)
        both = len(np.intersect1d(mine, theirs, assume_unique=True))
        return both / max(len(mine) + len(theirs) - both, 1)


class _Nearest:
    """For each of my rows the one of theirs, of those proposed, with which it shares the most bands, then the earliest;
    -1 for none."""

    def __init__(self, mine: _Sketch, theirs: _Sketch, folder: Path) -> None:
        self.rows = _filled_column(folder, len(mine))
        self._shared = _column(folder, np.uint8, len(mine))
        self._mine = mine
        self._theirs = theirs

    def propose(self, rows: Ints, others: Ints) -> None:
        """rows: each once."""
        for begin, end in _slices(len(rows)):
            row, other = rows[begin:end], others[begin:end]
            shared = np.zeros(len(row), np.uint8)
            for band in range(_BANDS):
                shared += self._mine.bands[band][row] == self._theirs.bands[band][other]
            best, known = self.rows[row], self._shared[row]
            better = (shared > known) | ((shared == known) & (other < best))
            self.rows[row[better]] = other[better]
            self._shared[row[better]] = shared[better]


def _column(folder: Path, dtype: Any, *shape: int) -> Any:
    """Zeros in a file without a name. Raises OSError: the room is taken now, since a mapped file that finds none later
    ends the process."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not size:
        return np.zeros(shape, dtype)
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, dtype, "r+", shape=shape).view(np.ndarray)


def _filled_column(folder: Path, rows: int) -> Ints:
    """-1 for each row."""
    column: Ints = _column(folder, np.int64, rows)
    column[:] = -1
    return column


def _slices(count: int) -> Iterator[tuple[int, int]]:
    return pairwise([*range(0, count, _PART_ROWS), count])


def _parts_of(rows: int) -> int:
    return max(1, -(-rows // _PART_ROWS))


def _part(keys: Any, wanted: Bools | None, part: int, parts: int) -> Iterator[Ints]:
    """The rows, in order and some at a time, whose keys fall into one of so many parts of all keys."""
    for begin, end in _slices(len(keys)):
        inside = keys[begin:end] % keys.dtype.type(parts) == part
        yield begin + np.flatnonzero(inside if wanted is None else inside & wanted[begin:end])


def _equals(keys: Any, wanted: Bools | None = None) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Of the wanted rows, those whose key an earlier one has: they, the first and the last one before them with it."""
    parts = _parts_of(len(keys))
    for part in range(parts):
        # The first rows of each key go on to the next turn: many rows of one key do not fit into one.
        held, size = [np.empty(0, np.int64)], 0
        for rows in _part(keys, wanted, part, parts):
            held.append(rows)
            size += len(rows)
            if size >= 2 * _PART_ROWS:
                firsts, found = _grouped(keys, np.concatenate(held))
                yield found
                held, size = [firsts], 0
        yield _grouped(keys, np.concatenate(held))[1]


def _grouped(keys: Any, rows: Ints) -> tuple[Ints, tuple[Ints, Ints, Ints]]:
    """The first row of each key, and what `_equals` tells of the others."""
    found = keys[rows]
    order = np.argsort(found, kind="stable")
    ordered, rows = found[order], rows[order]
    begins = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(rows)]
    leaders = rows[np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))]
    repeats = np.flatnonzero(~begins)
    return rows[begins], (rows[repeats], leaders[repeats], rows[repeats - 1])


def _matches(
    mine: Any, theirs: Any, wanted: Bools | None = None, able: Bools | None = None
) -> Iterator[tuple[Ints, Ints]]:
    """My wanted rows whose key an able one of theirs has, and the first such one."""
    parts = _parts_of(len(theirs))
    for part in range(parts):
        values, firsts = np.empty(0, theirs.dtype), np.empty(0, np.int64)
        for rows in _part(theirs, able, part, parts):
            # Of equal keys the first place is the earliest row's.
            values, places = np.unique(np.concatenate([values, theirs[rows]]), return_index=True)
            firsts = np.concatenate([firsts, rows])[places]
        if not len(values):
            continue
        for rows in _part(mine, wanted, part, parts):
            places = np.minimum(np.searchsorted(values, mine[rows]), len(values) - 1)
            hits = values[places] == mine[rows]
            yield rows[hits], firsts[places[hits]]


def _joined(held: Any, batch: Any) -> Any:
    table = pa.Table.from_batches([held, batch]).combine_chunks()
    (joined,) = table.to_batches()
    return joined


def _block(batch: Any) -> _Block:
    lines = batch.column("line").to_numpy()
    tokens = batch.column("tokens")
    offsets = tokens.offsets.to_numpy().astype(np.int64)
    sequences = np.flatnonzero(np.diff(lines, prepend=lines[:1] - 1))
    bounds = np.append(sequences, len(lines))
    roles = (
        batch.column("role").to_numpy() if "role" in batch.schema.names else np.zeros(len(lines), np.uint8)
    )
    begin, end = int(offsets[0]), int(offsets[-1])
    return _Block(
        lines[sequences],
        tokens.values.to_numpy()[begin:end],
        batch.column("mask").values.to_numpy()[begin:end],
        roles,
        bounds,
        offsets[bounds] - begin,
        np.diff(offsets),
    )


def _digests(block: _Block) -> list[bytes]:
    tokens, mask = block.tokens.tobytes(), block.mask.tobytes()
    found = []
    for row in range(len(block.lines)):
        begin, end = int(block.starts[row]), int(block.starts[row + 1])
        first, last = int(block.sequences[row]), int(block.sequences[row + 1])
        digest = blake2b(tokens[4 * begin : 4 * end], digest_size=16)
        digest.update(mask[begin:end])
        digest.update(block.roles[first:last].tobytes())
        digest.update(block.sizes[first:last].tobytes())
        found.append(digest.digest())
    return found


def _hashes(tokens: Any) -> Hashes:
    """One hash for each window of _SHINGLE tokens."""
    count = max(len(tokens) - _SHINGLE + 1, 0)
    values = tokens.astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(count, dtype=np.uint64)
    for place in range(_SHINGLE):
        hashes *= _BASE
        hashes += values[place : place + count]
    for shift, factor in zip((30, 27), _MIX, strict=True):
        hashes ^= hashes >> np.uint64(shift)
        hashes *= factor
    hashes ^= hashes >> np.uint64(31)
    return hashes


def _shingles(block: _Block) -> tuple[Hashes, Ints]:
    """The hashes of all windows within one row, and the row that each is of."""
    hashes = _hashes(block.tokens)
    owners = np.repeat(np.arange(len(block.lines)), np.diff(block.starts))
    inside = owners[: len(hashes)] == owners[_SHINGLE - 1 : len(hashes) + _SHINGLE - 1]
    return hashes[inside], owners[: len(hashes)][inside]


def _own(hashes: Hashes, owners: Ints, shared: Shared) -> tuple[Hashes, Ints]:
    """Without the shared ones."""
    own = ~shared[hashes >> np.uint64(64 - _SHARED_BITS)]
    return hashes[own], owners[own]


def _band_keys(hashes: Hashes, owners: Ints, rows: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """(rows, _BANDS) keys that are equal where the bins of a band are."""
    bins = np.full(rows * _BINS, _EMPTY)
    np.minimum.at(bins, owners * _BINS + (hashes >> np.uint64(58)).astype(np.int64), hashes)
    signature = _filled(bins.reshape(rows, _BINS))
    used = signature[:, : _BANDS * _BAND_BINS].reshape(rows, _BANDS, _BAND_BINS)
    keys = np.zeros((rows, _BANDS), dtype=np.uint64)
    for place in range(_BAND_BINS):
        keys = (keys ^ used[:, :, place]) * _BASE
        keys ^= keys >> np.uint64(29)
    return (keys >> np.uint64(32)).astype(np.uint32)


def _filled(bins: Hashes) -> Hashes:
    """Empty bins get the value of the next full one, marked with its distance."""
    filled, empty = bins.copy(), bins == _EMPTY
    for distance in range(1, _BINS):
        if not empty.any():
            break
        near = np.roll(bins, -distance, axis=1)
        take = empty & (near != _EMPTY)
        filled[take] = near[take] + np.uint64(distance * int(_BASE) % (1 << 64))
        empty &= ~take
    return filled
