from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from lathe.engine.watch import Evaluations, LossHistory, offenders


def after(*losses: float) -> LossHistory:
    history = LossHistory()
    for loss in losses:
        history = history.after(loss)
    return history


def test_ten_steps_far_above_the_best_level_are_divergence_and_nine_are_not() -> None:
    good = [2.0] * 12
    assert not after(*good, *[5.1] * 9).diverged
    assert after(*good, *[5.1] * 10).diverged
    assert not after(*good, *[5.1] * 5, 4.9, *[5.1] * 5).diverged


def test_a_loss_near_zero_may_jump_by_one() -> None:
    assert not after(*[0.01] * 20, *[1.0] * 30).diverged
    assert after(*[0.01] * 20, *[1.1] * 30).diverged


@given(st.lists(st.floats(0, 20), max_size=60))
def test_the_history_is_that_of_the_last_ten_and_the_lowest_level(losses: list[float]) -> None:
    history = after(*losses)
    assert history.recent == tuple(losses[-10:])
    means = [sum(losses[i : i + 10]) / 10 for i in range(len(losses) - 9)]
    assert history.lowest == (min(means) if means else None)


@given(st.lists(st.floats(0, 20), min_size=11, max_size=11))
def test_a_level_that_only_falls_never_diverges(losses: list[float]) -> None:
    assert not after(*sorted(losses, reverse=True)).diverged


def test_evaluations_count_those_since_the_lowest() -> None:
    evaluations = Evaluations()
    for step, loss in ((4, 2.0), (8, 1.5), (12, 1.5), (16, 1.6)):
        evaluations = evaluations.after(step, loss)
    assert evaluations == Evaluations(1.5, 8, 2)
    assert evaluations.after(20, 1.4) == Evaluations(1.4, 20, 0)


def test_the_rows_to_look_at_are_those_without_a_number_else_the_worst() -> None:
    assert offenders([1.0, math.nan, 2.0, math.inf], [1, 1, 1, 1]) == [1, 3]
    assert offenders([1.0, 9.0, 4.0, 0.0], [1, 3, 1, 0]) == [0, 1, 2]
    assert offenders([float(i) for i in range(9)], [1] * 9) == [4, 5, 6, 7, 8]
