"""Direct preference optimisation, and its variant IPO.

Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model"
(arXiv:2305.18290), eq. 7, with the label smoothing of cDPO (Mitchell 2023). IPO: Azar et al. 2023, "A General
Theoretical Paradigm to Understand Learning from Human Preferences" (arXiv:2310.12036), eq. 17, of log-ratios per token
as in TRL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from lathe.engine.batch import RowLoss
from lathe.engine.model import Dpo
from lathe.engine.recipes.preference import PAIR, check_roles, pair_figures, split_pairs
from lathe.engine.recipes.recipe import Batch, Job, Objectives
from lathe.engine.recipes.reference import ReferencedRecipe
from lathe.engine.recipes.turns import Turns


@dataclass(frozen=True, slots=True)
class DpoObjective:
    """Of a slice of whole pairs. reference: log p of each row under the reference; pairs: those of the whole batch."""

    method: Dpo
    reference: Sequence[float]
    pairs: int

    def __call__(self, sums: Tensor, counts: Tensor) -> RowLoss:
        ratios = sums - sums.new_tensor(self.reference)
        losses = self._losses(
            *split_pairs(ratios / counts.clamp(min=1) if self.method.loss_type == "ipo" else ratios)
        )
        chosen, rejected = split_pairs(self.method.beta * ratios)
        return RowLoss(losses.sum() / self.pairs, pair_figures(chosen, rejected, sums, self.pairs))

    def _losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        margin, beta, smoothing = chosen - rejected, self.method.beta, self.method.label_smoothing
        if self.method.loss_type == "ipo":
            return (margin - 1 / (2 * beta)) ** 2
        return -(1 - smoothing) * logsigmoid(beta * margin) - smoothing * logsigmoid(-beta * margin)


class DpoRecipe(ReferencedRecipe):
    """A pair is one unit: batch_size counts pairs."""

    unit = 2

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        method = job.config.method
        assert isinstance(method, Dpo)
        check_roles(job.data, PAIR)
        self._method = method

    def objectives(self, batch: Batch) -> Turns[Objectives]:
        reference = yield from self.reference.of(batch)
        pairs = len(batch.rows) // 2
        return lambda places: DpoObjective(self._method, [reference[place] for place in places], pairs)
