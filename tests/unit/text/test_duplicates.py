"""Rows that repeat others, by the tokens that are trained."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest

from lathe.text import duplicates
from lathe.text.arrow import BATCH_ROWS, TokenRow, write_tokens
from lathe.text.duplicates import NEAR, find_duplicates, find_overlap, read_duplicates, write_duplicates
from lathe.text.formats import Role

SYSTEM = list(range(1000, 1120))


def tokens(seed: int, size: int = 60) -> list[int]:
    return random.Random(seed).choices(range(30_000), k=size)


def written(path: Path, rows: list[list[int]], *, masks: dict[int, bytes] | None = None) -> Path:
    """One row a line, all but the first token trained unless a line has another mask."""
    write_tokens(
        path,
        [
            TokenRow(row, (masks or {}).get(line, b"\0" + b"\1" * (len(row) - 1)), line)
            for line, row in enumerate(rows, 1)
        ],
        {},
    )
    return path


def found(path: Path) -> list[tuple[int, int, bool]]:
    return [(item.line, item.of, item.exact) for item in find_duplicates(path)]


def test_equal_and_nearly_equal_rows_are_told_apart(tmp_path):
    rows = [SYSTEM + tokens(seed) for seed in range(40)]
    rows[20] = list(rows[3])
    # One token of sixty is another one: 51 of 61 shingles are left.
    rows[30] = [*rows[5][:-1], 29_999]
    rows[35] = list(rows[3])
    assert found(written(tmp_path / "x", rows)) == [(21, 4, True), (31, 6, False), (36, 4, True)]


def test_what_most_rows_share_makes_no_duplicates(tmp_path):
    rows = [SYSTEM + tokens(seed, 20) for seed in range(50)]
    assert found(written(tmp_path / "x", rows)) == []


def test_rows_that_differ_in_what_is_trained_are_not_the_same(tmp_path):
    rows = [tokens(seed) for seed in range(12)]
    rows[11] = list(rows[0])
    assert found(written(tmp_path / "x", rows, masks={12: b"\0" * 59 + b"\1"})) == [(12, 1, False)]


def test_pairs_are_one_row_also_across_batches(tmp_path):
    def pair(line: int, seed: int) -> list[TokenRow]:
        prompt = tokens(seed)
        return [
            TokenRow([*prompt, n], b"\0" * len(prompt) + b"\1", line, role)
            for n, role in ((1, Role.CHOSEN), (2, Role.REJECTED))
        ]

    count = BATCH_ROWS // 2 + 2
    rows = [row for line in range(1, count) for row in pair(line, line)] + pair(count, 7)
    write_tokens(tmp_path / "x", rows, {})
    assert found(tmp_path / "x") == [(count, 7, True)]


def test_a_row_in_the_other_file_is_found(tmp_path):
    train = [SYSTEM + tokens(seed) for seed in range(40)]
    valid = [SYSTEM + tokens(seed) for seed in range(100, 110)]
    valid[4] = list(train[8])
    valid[6] = [*train[10][:-1], 29_999]
    overlap = list(find_overlap(written(tmp_path / "train", train), written(tmp_path / "valid", valid)))
    assert [(item.line, item.of, item.exact) for item in overlap] == [(9, 5, True), (11, 7, False)]
    assert NEAR <= overlap[1].similarity < 1
    nothing = written(tmp_path / "none", [[1, 2]])
    assert list(find_overlap(nothing, tmp_path / "valid")) == []


@pytest.mark.parametrize("changed", [1, 2, 3])
def test_nearly_the_same_is_found_almost_always(tmp_path, changed):
    rows = [tokens(seed, 200) for seed in range(200)]
    for number in range(100):
        near = list(rows[number])
        for place in range(changed):
            near[50 * (place + 1)] = 29_998
        rows[100 + number] = near
    # Each changed token takes five of 196 shingles away: similarities of 0.95, 0.90, 0.86.
    assert len(list(find_duplicates(written(tmp_path / "x", rows)))) >= 98


def test_short_rows_are_compared_whole_only(tmp_path):
    rows = [[1, 2, number] for number in range(12)]
    assert found(written(tmp_path / "x", [*rows, [1, 2, 3]])) == [(13, 4, True)]


@pytest.mark.parametrize("part", [1, 7, 64])
def test_what_is_found_does_not_depend_on_the_parts(tmp_path, monkeypatch, part):
    rows = [tokens(seed % 23, 40) for seed in range(60)]
    for number in range(0, 60, 5):
        rows[number] = [*rows[number][:-1], number]
    path, other = written(tmp_path / "x", rows), written(tmp_path / "y", rows[10:40])
    within, between = list(find_duplicates(path)), list(find_overlap(path, other))
    assert within and between
    monkeypatch.setattr(duplicates, "_WRITTEN_AT_ONCE", part)
    write_duplicates(tmp_path / "within", path)
    write_duplicates(tmp_path / "between", path, other)
    assert list(read_duplicates(tmp_path / "within")) == within
    assert list(read_duplicates(tmp_path / "between")) == between
    monkeypatch.setattr(duplicates, "_PART_ROWS", part)
    assert list(find_overlap(path, other)) == between
    assert [item.line for item in find_duplicates(path)] == [item.line for item in within]
    assert [item for item in find_duplicates(path) if item.exact] == [item for item in within if item.exact]


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "_PART_ROWS", 512)

    def peak(count: int) -> int:
        path = written(tmp_path / "x", [tokens(seed, 12) for seed in range(count)] + [tokens(0, 12)])
        tracemalloc.start()
        held = pa.total_allocated_bytes()
        most = sum(1 for _ in find_duplicates(path)) and tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most + pa.total_allocated_bytes() - held

    # 73 bytes a row would be kept in memory, where it is not in files.
    assert peak(12_000) - peak(4_000) < 10 * 8_000
