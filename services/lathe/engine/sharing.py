"""Who shares the coming pass: the promise to the oldest attempt, and the others' shares. Pure; no torch, no clock.

The oldest attempt advances at no less than 1 / `slowdown` of its speed alone: for each second that its own work takes
the others get `slowdown - 1` of one, in its passes or in passes of their own. What they have not taken yet is its
*credit*; work that cannot be cut may overdraw it, and nobody else is served until it is paid back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

# What is left of a measured pass's weight when the next one has been measured: machines change, so the last twenty
# count. Fewer of the first ones: a cold pass, which takes several times as long, is soon forgotten.
_FADES = 0.95


def _fades(passes: int) -> float:
    """After so many passes before this one: 0, 1/4, 2/5, 1/2, … up to `_FADES`."""
    return min(_FADES, passes / (passes + 3))


# Relative, and small beside any measurement: decides only what the passes so far leave open.
_RIDGE = 1e-3
# The oldest goes alone when its passes alone are less of what is remembered: what such a pass takes could else not be
# told from what others add to it. At most each 14th pass, and none where the credit leaves it alone anyway.
_LEAST_ALONE = 1 / 40
# Of the time that the promise leaves to the others, what they are given: the rest is for estimates that were wrong.
MARGIN = 0.9


class PassCost:
    """seconds = a + b tokens + c jobs of a training pass, a, b, c >= 0, fitted to the passes measured so far.

    Least squares with fading memory; the non-negative optimum of three coefficients is found by trying every set of
    them (Lawson & Hanson 1974, chapter 23, for so few there is nothing to search). While all passes were alike, a ridge
    gives each term a third.
    """

    def __init__(self) -> None:
        self._products = [[0.0] * 3 for _ in range(3)]
        self._targets = [0.0] * 3
        self._coefficients: tuple[float, ...] | None = None
        self._passes = 0
        self._weight = self._alone = 0.0
        self._whose: int | None = None

    @property
    def known(self) -> bool:
        """Whether any pass was measured."""
        return self._coefficients is not None

    @property
    def forgets_alone(self) -> bool:
        """Whether passes were measured, but hardly any of the oldest job alone lately."""
        return self._alone < _LEAST_ALONE * self._weight

    def learn(self, tokens: int, jobs: int, seconds: float, oldest: int | None = None) -> None:
        """A pass of so many tokens of so many jobs took this long.

        oldest: which job is the oldest (its order of arrival), where the pass was its alone. Another job's pass does
        not tell what the promise is measured by: its tokens may be far from the oldest's.
        """
        if oldest is not None and oldest != self._whose:
            self._whose, self._alone = oldest, 0.0
        terms, fades = (1.0, float(tokens), float(jobs)), _fades(self._passes)
        self._passes += 1
        self._weight = fades * self._weight + 1
        self._alone = fades * self._alone + (oldest is not None)
        for i, left in enumerate(terms):
            self._targets[i] = fades * self._targets[i] + left * seconds
            for j, right in enumerate(terms):
                self._products[i][j] = fades * self._products[i][j] + left * right
        self._coefficients = self._fitted()

    def seconds(self, tokens: int, jobs: int = 1) -> float:
        """What such a pass will take; 0 while nothing is known."""
        if self._coefficients is None:
            return 0.0
        fixed, each_token, each_job = self._coefficients
        return fixed + each_token * tokens + each_job * jobs

    def _fitted(self) -> tuple[float, ...]:
        best, least = (0.0, 0.0, 0.0), 0.0
        for size in (1, 2, 3):
            for terms in combinations(range(3), size):
                found = self._solved(terms)
                # With its optimum w, the sum of squares has fallen by w . y.
                gain = sum(value * self._targets[i] for i, value in zip(terms, found, strict=True))
                if min(found) >= 0 and gain > least:
                    whole = [0.0, 0.0, 0.0]
                    for i, value in zip(terms, found, strict=True):
                        whole[i] = value
                    best, least = (whole[0], whole[1], whole[2]), gain
        return best

    def _solved(self, terms: Sequence[int]) -> list[float]:
        """The normal equations of these terms alone (positive definite, by the ridge), by elimination."""
        rows = [
            [self._products[i][j] * (1 + _RIDGE if i == j else 1) for j in terms] + [self._targets[i]]
            for i in terms
        ]
        size = len(rows)
        for i in range(size):
            for below in range(i + 1, size):
                factor = rows[below][i] / rows[i][i]
                rows[below] = [a - factor * b for a, b in zip(rows[below], rows[i], strict=True)]
        found = [0.0] * size
        for i in reversed(range(size)):
            found[i] = (rows[i][size] - sum(rows[i][j] * found[j] for j in range(i + 1, size))) / rows[i][i]
        return found


@dataclass(frozen=True, slots=True)
class Share:
    """One attempt that waits for a pass: its order of arrival, tokens it had here so far, and those it waits for.

    rows, longest: how many rows they are, and the tokens of the longest: attention pads each to it. joins: whether its
    slice may share a pass (training slices may).
    """

    order: int
    consumed: int
    tokens: int
    rows: int = 1
    longest: int = 0
    joins: bool = True

    @property
    def padded(self) -> int:
        """Tokens of its rows as attention holds them."""
        return self.rows * self.longest


def spare(slowdown: float) -> float:
    """Seconds that others get for each second of the oldest's own work."""
    return MARGIN * (slowdown - 1)


def most_credit(waiting: Sequence[Share], room: int, cost: PassCost) -> float:
    """What is worth saving: enough for any of the waiting slices in a pass of its own, or for one full pass.

    More would let those who come later hold up the oldest for long at a time.
    """
    return cost.seconds(max([room, *(share.tokens for share in waiting)]), max(1, len(waiting)))


def credit_after(
    waiting: Sequence[Share],
    chosen: Sequence[int],
    seconds: float,
    room: int,
    cost: PassCost,
    *,
    credit: float,
    earns: float,
) -> float:
    """The credit after a pass of the chosen slices that took so long and that `cost` has learned."""
    oldest = min(range(len(waiting)), key=lambda index: waiting[index].order)
    own = 0.0
    if oldest in chosen:
        own = seconds if len(chosen) == 1 else min(seconds, cost.seconds(waiting[oldest].tokens))
    return min(credit + earns * own - (seconds - own), most_credit(waiting, room, cost))


def join(
    waiting: Sequence[Share], room: int, cost: PassCost, *, credit: float = math.inf, earns: float = 0.0
) -> list[int]:
    """Which of the waiting slices (at least one) are the next pass: the oldest attempt's, and others' by share.

    credit: seconds that others may take now; earns: those that they get for each second of the oldest's own work.
    Others are taken from the fewest tokens so far on, while the joined slices stay within `room` (see `_fits`) and
    what they add to the pass within the credit; no slice is cut. The first of them is the next to be served whatever
    the others wait for: where the credit does not reach, it is saved for that one, and where the oldest leaves no
    room for it (or its slice cannot join) the credit pays a pass of its own, without the oldest. The oldest is alone
    now and then so that the promise is kept by what was measured.
    """
    oldest = min(range(len(waiting)), key=lambda index: waiting[index].order)
    others = sorted(
        (index for index in range(len(waiting)) if index != oldest),
        key=lambda index: (waiting[index].consumed, waiting[index].order),
    )
    if not others or cost.forgets_alone:
        return [oldest]
    first = others[0]
    if _fits(waiting, [oldest, first], room):
        budget = credit + earns * cost.seconds(waiting[oldest].tokens)
        return _joined(waiting, [oldest], others, room=room, cost=cost, budget=budget)
    left = credit - cost.seconds(waiting[first].tokens)
    if left < 0 or not _affordable(cost, credit):
        return [oldest]
    return _joined(waiting, [first], others[1:], room=room, cost=cost, budget=left)


def _joined(
    waiting: Sequence[Share],
    chosen: list[int],
    others: Sequence[int],
    *,
    room: int,
    cost: PassCost,
    budget: float,
) -> list[int]:
    tokens = sum(waiting[index].tokens for index in chosen)
    for index in others:
        if not _fits(waiting, [*chosen, index], room):
            continue
        before = cost.seconds(tokens, len(chosen))
        tokens += waiting[index].tokens
        budget -= cost.seconds(tokens, len(chosen) + 1) - before
        if budget < 0 or not _affordable(cost, budget):
            break
        chosen.append(index)
    return chosen


def _affordable(cost: PassCost, budget: float) -> bool:
    """What nobody has measured yet is paid afterwards, from a credit that is there."""
    return cost.known or budget > 0


def _fits(waiting: Sequence[Share], chosen: Sequence[int], room: int) -> bool:
    """Whether these may be one pass: no more tokens than the room, nor more of them in attention, padding counted,
    than the room or one of the slices by itself (which its preflight has measured)."""
    some = [waiting[index] for index in chosen]
    padded = sum(share.rows for share in some) * max(share.longest for share in some)
    return (
        all(share.joins for share in some)
        and sum(share.tokens for share in some) <= room
        and padded <= max(room, *(share.padded for share in some))
    )
