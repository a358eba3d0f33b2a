"""Repeating calls while the platform is away."""

import time

import pytest

from lathe.client.transport import retrying
from lathe.common.errors import DeadlineExceeded, LatheError, Unavailable


def test_the_reason_outlives_the_last_trys_little_time() -> None:
    answers: list[LatheError] = [
        Unavailable("The database is away.", retry_after=0.001),
        DeadlineExceeded("late"),
    ]

    def once() -> None:
        raise answers.pop(0)

    with pytest.raises(Unavailable, match="database is away"):
        retrying(once, time.monotonic() + 10)
    assert not answers


def test_a_single_try_that_took_too_long_says_so() -> None:
    def once() -> None:
        raise DeadlineExceeded("late")

    with pytest.raises(DeadlineExceeded):
        retrying(once, time.monotonic() + 10)
