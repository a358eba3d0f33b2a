"""Rows that are the same, or nearly the same, as they are trained: found in token objects, within one or between two.

The same: equal tokens, masks and roles. Nearly the same: a Jaccard similarity of their sets of five-token shingles of
at least NEAR. Shingles that many rows share (a system prompt, the template's own words, a question asked of every
text) say nothing and are left out: without them two rows are compared by what they have of their own.

Candidates come from MinHash in one permutation (Li, Owen & Zhang, 2012) with empty bins filled from their neighbours
(Shrivastava & Li, 2014), in bands (Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, 3.4); each is checked on
the rows themselves. Of two rows with similarity 0.8 the bands miss 1 in 100, of two with 0.9 1 in 50,000. Memory: about
150 bytes a row beside the files, which are mapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
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

Ints = np.ndarray[Any, np.dtype[np.int64]]
Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Shared = np.ndarray[Any, np.dtype[np.bool_]]
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


def find_duplicates(path: Path) -> list[Duplicate]:
    """The rows of a token object that repeat an earlier one of it, by line. Each row is told once."""
    rows = _Rows(path)
    sketch = _Sketch.of(rows, rows.shared_shingles())
    first: dict[bytes, int] = {}
    found: list[Duplicate] = []
    fresh: list[int] = []
    for row, digest in enumerate(sketch.digests):
        earlier = first.setdefault(digest, row)
        if earlier == row:
            fresh.append(row)
        else:
            found.append(Duplicate(sketch.lines[row], sketch.lines[earlier]))
    for row, earlier in _candidates_within(sketch, np.array(fresh, dtype=np.int64)).items():
        similarity = sketch.similarity(row, sketch, earlier)
        if similarity >= NEAR:
            found.append(Duplicate(sketch.lines[row], sketch.lines[earlier], min(similarity, 0.999)))
    return sorted(found, key=lambda item: item.line)


def find_overlap(path: Path, other: Path) -> list[Duplicate]:
    """The rows of one token object that repeat a row of another, by line; `of` is the other's line."""
    rows = _Rows(path)
    shared = rows.shared_shingles()
    mine, theirs = _Sketch.of(rows, shared), _Sketch.of(_Rows(other), shared)
    known = {digest: row for row, digest in reversed(list(enumerate(theirs.digests)))}
    found: list[Duplicate] = []
    for row, candidate in enumerate(_candidates_between(mine, theirs)):
        same = known.get(mine.digests[row])
        if same is not None:
            found.append(Duplicate(mine.lines[row], theirs.lines[same]))
        elif candidate >= 0:
            similarity = mine.similarity(row, theirs, candidate)
            if similarity >= NEAR:
                found.append(Duplicate(mine.lines[row], theirs.lines[candidate], min(similarity, 0.999)))
    return found


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
            order = np.lexsort([hashes, owners])
            hashes, owners = hashes[order], owners[order]
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
    """What is kept of each row. bands: (rows, _BANDS) keys; sized: rows that have enough shingles of their own.
    blocks: where a row's tokens are: (block, row in it)."""

    lines: list[int]
    digests: list[bytes]
    bands: np.ndarray[Any, np.dtype[np.uint32]]
    sized: np.ndarray[Any, np.dtype[np.bool_]]
    shared: Shared
    blocks: list[_Block]
    block_starts: Ints

    @classmethod
    def of(cls, rows: _Rows, shared: Shared) -> _Sketch:
        lines: list[int] = []
        digests: list[bytes] = []
        bands, sized, blocks, starts = [], [], [], [0]
        for block in rows.blocks():
            hashes, owners = _own(*_shingles(block), shared)
            lines += block.lines.tolist()
            digests += _digests(block)
            bands.append(_band_keys(hashes, owners, len(block.lines)))
            sized.append(np.bincount(owners, minlength=len(block.lines)) >= _LEAST_SHINGLES)
            # Views of the mapped file, so that keeping them costs nothing.
            blocks.append(block)
            starts.append(len(lines))
        return cls(
            lines,
            digests,
            np.concatenate(bands) if bands else np.empty((0, _BANDS), dtype=np.uint32),
            np.concatenate(sized) if sized else np.empty(0, dtype=np.bool_),
            shared,
            blocks,
            np.array(starts),
        )

    def own_shingles(self, row: int) -> Hashes:
        number = int(np.searchsorted(self.block_starts, row, side="right")) - 1
        block, place = self.blocks[number], row - int(self.block_starts[number])
        begin, end = int(block.starts[place]), int(block.starts[place + 1])
        hashes, _ = _own(
            _hashes(block.tokens[begin:end]),
            np.zeros(max(end - begin - _SHINGLE + 1, 0), np.int64),
            self.shared,
        )
        return np.unique(hashes)

    def similarity(self, row: int, other: _Sketch, candidate: int) -> float:
        """Jaccard's, of the two rows' own shingles."""
        mine, theirs = self.own_shingles(row), other.own_shingles(candidate)
        both = len(np.intersect1d(mine, theirs, assume_unique=True))
        return both / max(len(mine) + len(theirs) - both, 1)


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


def _candidates_within(sketch: _Sketch, rows: Ints) -> Mapping[int, int]:
    """Row -> the earlier row with which it shares the most bands, for the given rows."""
    rows = rows[sketch.sized[rows]]
    pairs: list[Ints] = []
    for band in range(_BANDS):
        keys = sketch.bands[rows, band]
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        begins = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(ordered) else np.empty(0, bool)
        leaders = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
        repeats = np.flatnonzero(~begins)
        for earlier in (leaders[repeats], order[repeats - 1]):
            pairs.append(np.stack([rows[order[repeats]], rows[earlier]]))
    return _most_shared(np.concatenate(pairs, axis=1))


def _candidates_between(mine: _Sketch, theirs: _Sketch) -> list[int]:
    """For each of my rows the one of theirs with which it shares the most bands; -1 for none."""
    rows = np.flatnonzero(theirs.sized)
    pairs: list[Ints] = []
    for band in range(_BANDS):
        keys = theirs.bands[rows, band]
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        if not len(ordered):
            break
        places = np.minimum(np.searchsorted(ordered, mine.bands[:, band]), len(ordered) - 1)
        hits = np.flatnonzero((ordered[places] == mine.bands[:, band]) & mine.sized)
        pairs.append(np.stack([hits, rows[order[places[hits]]]]))
    best = _most_shared(np.concatenate(pairs, axis=1)) if pairs else {}
    return [best.get(row, -1) for row in range(len(mine.lines))]


def _most_shared(pairs: Ints) -> dict[int, int]:
    """Of (row, other) pairs, one for each row: the most frequent, then the earliest."""
    size = int(pairs.max(initial=0)) + 1
    found, counts = np.unique(pairs[0] * size + pairs[1], return_counts=True)
    rows, others = np.divmod(found, size)
    order = np.lexsort([others, -counts, rows])
    rows, others = rows[order], others[order]
    first = np.flatnonzero(np.diff(rows, prepend=-1))
    return dict(zip(rows[first].tolist(), others[first].tolist(), strict=True))
