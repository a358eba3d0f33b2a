"""The rules by which a run watches its losses: when it has diverged, when it is time to stop. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

DIVERGENCE_STEPS = 10
# How many rows a message names.
_NAMED = 5


@dataclass(frozen=True, slots=True)
class LossHistory:
    """The training losses so far, as far as the rule of divergence needs them.

    The loss has diverged when each of the last 10 steps' lies above 2 * lowest + 1, where `lowest` is the lowest mean
    of 10 consecutive steps: twice the best level is beyond the noise of batches, and 1 (nat) leaves room to losses
    near zero. recent: of the last 10 steps, the newest last.
    """

    recent: tuple[float, ...] = ()
    lowest: float | None = None

    def after(self, loss: float) -> LossHistory:
        recent = (*self.recent, loss)[-DIVERGENCE_STEPS:]
        if len(recent) < DIVERGENCE_STEPS:
            return LossHistory(recent, self.lowest)
        mean = sum(recent) / len(recent)
        return LossHistory(recent, mean if self.lowest is None else min(mean, self.lowest))

    @property
    def diverged(self) -> bool:
        return (
            self.lowest is not None
            and len(self.recent) == DIVERGENCE_STEPS
            and min(self.recent) > 2 * self.lowest + 1
        )


@dataclass(frozen=True, slots=True)
class Evaluations:
    """The full validations so far: the lowest loss, its step, and how many came since without a lower one."""

    best_loss: float | None = None
    best_step: int = 0
    since_best: int = 0

    def after(self, step: int, loss: float) -> Evaluations:
        if self.best_loss is None or loss < self.best_loss:
            return Evaluations(loss, step, 0)
        return Evaluations(self.best_loss, self.best_step, self.since_best + 1)


def offenders(losses: Sequence[float], counts: Sequence[int]) -> list[int]:
    """Which rows of a batch to look at: those whose loss is no number, else those with the highest mean loss.

    losses: sum of -log p of each row; counts: its trained tokens. At most five, in order.
    """
    broken = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
    if broken:
        return broken[:_NAMED]
    means = {i: loss / count for i, (loss, count) in enumerate(zip(losses, counts, strict=True)) if count}
    return sorted(sorted(means, key=means.__getitem__, reverse=True)[:_NAMED])
