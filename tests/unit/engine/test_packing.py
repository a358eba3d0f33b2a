from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.common.errors import InvalidArgument
from lathe.engine.packing import Slice, cut, halve, slice_plan

FIRST = (4, 2, 6, 3, 0, 5, 1, 7)
SECOND = (7, 1, 4, 0, 3, 5, 6, 2)
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**40), st.integers(1, 100))
def test_every_epoch_takes_every_row_once_in_slices_within_the_limit(
    lengths: list[int], n_epochs: int, batch_size: int, seed: int, limit: int
) -> None:
    plan = slice_plan(
        lengths, n_epochs=n_epochs, batch_size=batch_size, seed=seed, max_tokens_per_slice=limit
    )
    steps = [plan.step(i) for i in range(plan.total_steps)]
    for epoch in range(n_epochs):
        taken = [row for step in steps if step.epoch == epoch for row in step.rows]
        assert sorted(taken) == list(range(len(lengths)))
    for step in steps:
        assert 1 <= len(step.rows) <= batch_size
        for piece in step.slices:
            assert len(piece.rows) == 1 or sum(lengths[row] for row in piece.rows) <= limit
    assert [step.index for step in steps if step.ends_epoch] == [
        (epoch + 1) * plan.steps_per_epoch - 1 for epoch in range(n_epochs)
    ]


@given(LENGTHS, st.integers(0, 2**40), st.integers(1, 100), st.integers(1, 100))
def test_a_step_depends_on_nothing_but_its_index_and_the_settings(
    lengths: list[int], seed: int, limit: int, other_limit: int
) -> None:
    plan = slice_plan(lengths, n_epochs=2, batch_size=4, seed=seed, max_tokens_per_slice=limit)
    last = plan.total_steps - 1
    again = slice_plan(lengths, n_epochs=2, batch_size=4, seed=seed, max_tokens_per_slice=limit)
    for i in range(plan.total_steps):
        plan.step(i)
    assert again.step(last) == plan.step(last)
    cut_otherwise = slice_plan(lengths, n_epochs=2, batch_size=4, seed=seed, max_tokens_per_slice=other_limit)
    assert cut_otherwise.step(last).rows == plan.step(last).rows


@given(
    st.integers(1, 3),
    st.lists(st.integers(1, 60), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(1, 100),
    st.integers(0, 3),
)
def test_units_stay_whole_and_in_order(
    unit: int, sizes: list[int], batch_size: int, limit: int, halvings: int
) -> None:
    lengths = [size + i for size in sizes for i in range(unit)]
    plan = slice_plan(
        lengths, n_epochs=1, batch_size=batch_size, seed=1, max_tokens_per_slice=limit, unit=unit
    )
    assert plan.total_steps == -(-len(sizes) // batch_size)
    taken = []
    for index in range(plan.total_steps):
        step = plan.step(index)
        assert len(step.rows) <= batch_size * unit
        pieces = step.slices
        for piece in pieces:
            assert len(piece.rows) == unit or sum(lengths[row] for row in piece.rows) <= limit
        for _ in range(halvings):
            pieces = tuple(half for piece in pieces for half in halve(piece, unit))
        assert tuple(row for piece in pieces for row in piece.rows) == step.rows
        for piece in pieces:
            for start in range(0, len(piece.rows), unit):
                first = piece.rows[start]
                assert first % unit == 0
                assert piece.rows[start : start + unit] == tuple(range(first, first + unit))
        taken += step.rows
    assert sorted(taken) == list(range(len(lengths)))


def test_the_order_is_fixed_for_ever() -> None:
    plan = slice_plan([1] * 8, n_epochs=2, batch_size=8, seed=7, max_tokens_per_slice=8)
    assert plan.step(0).rows == FIRST
    assert plan.step(1).rows == SECOND


def test_evaluation_keeps_the_rows_own_order() -> None:
    assert cut(range(4), [3, 4, 9, 1], 8) == (Slice((0, 1)), Slice((2,)), Slice((3,)))


def test_halving() -> None:
    assert halve(Slice((4, 1, 7))) == (Slice((4, 1)), Slice((7,)))
    assert halve(Slice((4,))) == (Slice((4,)),)


@pytest.mark.parametrize(
    ("lengths", "change", "word"),
    [
        ([], {}, "no row"),
        ([3, 0], {}, "row 1"),
        ([3], {"batch_size": 0}, "batch_size"),
        ([3], {"n_epochs": 0}, "n_epochs"),
        ([3, 3, 3], {"unit": 2}, "a row is missing"),
    ],
)
def test_a_wrong_plan_is_refused(lengths: list[int], change: dict[str, int], word: str) -> None:
    settings = {"n_epochs": 1, "batch_size": 2, "seed": 0, "max_tokens_per_slice": 10, **change}
    with pytest.raises(InvalidArgument, match=word):
        slice_plan(lengths, **settings)


def test_a_step_outside_the_plan_is_refused() -> None:
    plan = slice_plan([2], n_epochs=1, batch_size=2, seed=0, max_tokens_per_slice=10)
    with pytest.raises(InvalidArgument, match="step 1"):
        plan.step(1)
