"""Which of a job's checkpoints stay. Pure.

Users keep the last so many of the epochs' checkpoints and the best one; an attempt can go on from the newest two of any
kind. The files of all others go.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lathe.engine.model import SnapshotKind

# One may be damaged or half deleted; the one before it is then the start.
RESUME_KEPT = 2


@dataclass(frozen=True, slots=True)
class Stored:
    """A complete checkpoint, of whichever attempt of the job.

    full_valid_loss: on the whole validation file; None where nothing was validated.
    """

    prefix: str
    step: int
    kind: SnapshotKind
    full_valid_loss: float | None = None


def kept_steps(stored: Sequence[Stored], keep: int) -> frozenset[int]:
    """The epochs' checkpoints that users keep: the last `keep` (0: all), and the one of the lowest loss where losses
    are known."""
    losses = {item.step: item.full_valid_loss for item in stored if item.kind is SnapshotKind.EPOCH}
    known = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
    best = {min(known, key=lambda step: (known[step], step))} if known else set()
    last = sorted(losses)[-keep:] if keep else losses
    return frozenset(last) | best


def superseded_steps(stored: Sequence[Stored], keep: int) -> tuple[int, ...]:
    """The epochs' checkpoints that users do not keep, ascending."""
    kept = kept_steps(stored, keep)
    return tuple(sorted({item.step for item in stored if item.kind is SnapshotKind.EPOCH} - kept))


def removable(stored: Sequence[Stored], given_up: frozenset[int]) -> tuple[Stored, ...]:
    """Those whose files can go while the job runs. stored: of equal steps the older one first; given_up: the steps of
    epochs' checkpoints that jobs knows to be given up."""
    older = sorted(stored, key=lambda item: item.step)[:-RESUME_KEPT]
    return tuple(item for item in older if item.kind is not SnapshotKind.EPOCH or item.step in given_up)
