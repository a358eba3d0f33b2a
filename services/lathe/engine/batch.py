"""What goes through a training pass, and what it is trained for. torch only in the objectives' tensors.

A slice is whole rows of one adapter with the objective that they are trained for. `Engine.forward_backward` takes
slices of several adapters at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from lathe.text.formats import Role


@dataclass(frozen=True, slots=True)
class TrainRow:
    """A rendered example: mask[i] says that token i is a target; mask[0] is ignored (nothing predicts it).

    role: what the row is to its method. line: its 1-based line in the dataset, 0 if it has none.
    """

    tokens: Sequence[int]
    mask: Sequence[bool]
    role: Role = Role.EXAMPLE
    line: int = 0


def trained_tokens(row: TrainRow) -> int:
    """How many targets a row has; the first token cannot be one."""
    return sum(bool(m) for m in row.mask[1:])


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """Maximum likelihood: the sum of -log p over the trained tokens, divided by `batch_tokens`.

    batch_tokens: trained tokens of the whole effective batch, so that the slices' gradients add up to those of
    its mean.
    """

    batch_tokens: int


@dataclass(frozen=True, slots=True)
class RowLoss:
    """loss: a scalar with a graph to the row sums, the slice's share of the batch's loss.

    figures: its share of the batch's figures, under TRL's names: those of a batch's slices add up.
    """

    loss: Tensor
    figures: Mapping[str, float] = field(default_factory=dict)


class RowObjective(Protocol):
    """A loss of whole rows' log-probabilities (DPO and its kin).

    sums [n]: sums[i] is the sum of log p over row i's trained tokens; counts [n]: how many they are. Both are float64
    and on the CPU, whatever the base is. The answer's loss is this slice's share of the batch's loss; the engine
    carries its gradient through `sums` into the adapter.
    """

    def __call__(self, sums: Tensor, counts: Tensor) -> RowLoss: ...


Objective = CrossEntropy | RowObjective


@dataclass(frozen=True, slots=True)
class TrainSlice:
    """Whole rows of one adapter (never the base) in one pass, and what they are trained for."""

    key: str
    rows: tuple[TrainRow, ...]
    objective: Objective

    @property
    def input_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)


@dataclass(frozen=True, slots=True)
class SliceResult:
    """What a slice measured.

    loss_sum: sum of -log p over its trained tokens; tokens: their number; correct: how many no other token beat;
    input_tokens: all its tokens. loss: its share of the batch's loss, as its objective says. figures: the
    objective's. row_losses: sum of -log p of each row. fused: its pass had other jobs' slices in it.
    """

    loss_sum: float
    tokens: int
    correct: int
    input_tokens: int
    loss: float = 0.0
    figures: Mapping[str, float] = field(default_factory=dict)
    row_losses: tuple[float, ...] = ()
    fused: bool = False


def total(results: Sequence[SliceResult]) -> SliceResult:
    """The slices of one batch, in order, as one."""
    names = dict.fromkeys(name for result in results for name in result.figures)
    return SliceResult(
        loss_sum=math.fsum(result.loss_sum for result in results),
        tokens=sum(result.tokens for result in results),
        correct=sum(result.correct for result in results),
        input_tokens=sum(result.input_tokens for result in results),
        loss=math.fsum(result.loss for result in results),
        figures={name: math.fsum(result.figures.get(name, 0.0) for result in results) for name in names},
        row_losses=tuple(loss for result in results for loss in result.row_losses),
        fused=any(result.fused for result in results),
    )
