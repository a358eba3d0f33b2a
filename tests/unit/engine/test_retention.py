"""Which checkpoints stay: the last so many and the best one for users, the newest two for going on."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from lathe.engine.model import SnapshotKind
from lathe.engine.retention import RESUME_KEPT, Stored, kept_steps, removable, superseded_steps


def epoch(step: int, loss: float | None = None) -> Stored:
    return Stored(f"a/step-{step}", step, SnapshotKind.EPOCH, loss)


def resume(step: int) -> Stored:
    return Stored(f"a/step-{step}", step, SnapshotKind.RESUME)


def test_the_best_one_stays_beside_the_last_ones() -> None:
    stored = [epoch(step, loss) for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, math.nan))]
    assert kept_steps(stored, 2) == {2, 4, 5}
    assert superseded_steps(stored, 2) == (1, 3)


def test_of_equal_losses_the_earlier_one_is_the_best() -> None:
    assert kept_steps([epoch(1, 1.0), epoch(2, 1.0), epoch(3, 1.0)], 1) == {1, 3}


def test_without_a_number_all_stay() -> None:
    assert superseded_steps([epoch(1), epoch(2), epoch(3)], 0) == ()


def test_going_on_needs_the_newest_two_whatever_they_are() -> None:
    stored = [epoch(1), resume(2), epoch(3), resume(4), epoch(5)]
    assert removable(stored, frozenset({1, 3, 5})) == (epoch(1), resume(2), epoch(3))
    assert removable(stored, frozenset()) == (resume(2),)


history = st.lists(
    st.builds(
        Stored,
        st.uuids().map(str),
        st.integers(1, 9),
        st.sampled_from([SnapshotKind.EPOCH, SnapshotKind.RESUME]),
        st.none() | st.floats(0, 3),
    ),
    max_size=8,
)


@given(history, st.integers(1, 4))
def test_what_goes_is_needed_by_nobody(stored: list[Stored], keep: int) -> None:
    given_up = frozenset(superseded_steps(stored, keep))
    gone = removable(stored, given_up)
    left = [item for item in stored if item not in gone]
    assert kept_steps(left, keep) == kept_steps(stored, keep)
    newest = sorted(item.step for item in stored)[-RESUME_KEPT:]
    assert sorted(item.step for item in left)[-RESUME_KEPT:] == newest
    # What was given up once never comes back.
    assert not given_up & kept_steps([*stored, epoch(10, 0.0)], keep)
