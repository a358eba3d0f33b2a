"""Kahneman-Tversky optimisation: rows that are each good or bad by themselves, without pairs.

Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization" (arXiv:2402.01306), eq. 7 and 8. The
reference point z0 is estimated over the whole batch from mismatched rows: each prompt with the answer of another row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from lathe.engine.batch import RowLoss, TrainRow
from lathe.engine.model import Kto
from lathe.engine.recipes.preference import check_roles, shares
from lathe.engine.recipes.recipe import Batch, Job, Objectives
from lathe.engine.recipes.reference import ReferencedRecipe
from lathe.engine.recipes.turns import Turns
from lathe.text.formats import Role


@dataclass(frozen=True, slots=True)
class KtoObjective:
    """desirable, reference: of each row of the slice; the latter is log p under the reference.

    Of the whole batch: kl, its z0 (a constant: no gradient goes through it); good and bad, its rows of either kind.
    """

    method: Kto
    desirable: Sequence[bool]
    reference: Sequence[float]
    kl: float
    good: int
    bad: int

    def __call__(self, sums: Tensor, counts: Tensor) -> RowLoss:
        good = torch.tensor(self.desirable, dtype=torch.bool, device=sums.device)
        ratios = sums - sums.new_tensor(self.reference)
        gain = torch.sigmoid(self.method.beta * torch.where(good, ratios - self.kl, self.kl - ratios))
        weight = torch.where(good, self.method.desirable_weight, self.method.undesirable_weight)
        rows = self.good + self.bad
        loss = (weight * (1 - gain)).sum() / rows
        figures = {
            "kl": self.kl * len(good) / rows,
            **self._figures("chosen", self.method.beta * ratios[good], sums[good], self.good),
            **self._figures("rejected", self.method.beta * ratios[~good], sums[~good], self.bad),
        }
        if self.good and self.bad:
            figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
        return RowLoss(loss, figures)

    def _figures(self, kind: str, rewards: Tensor, logps: Tensor, of: int) -> dict[str, float]:
        return shares({f"rewards/{kind}": rewards, f"logps/{kind}": logps}, of) if of else {}


class KtoRecipe(ReferencedRecipe):
    """Rows stand alone. A step scores its mismatched rows with both models, beside its own rows' reference."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        method = job.config.method
        assert isinstance(method, Kto)
        check_roles(job.data, [(Role.DESIRABLE, Role.UNDESIRABLE)])
        self._method = method
        self._longest = max(
            len(row.tokens) for rows in (job.data.training, job.data.validation) for row in rows
        )

    def objectives(self, batch: Batch) -> Turns[Objectives]:
        reference = yield from self.reference.of(batch)
        kl = yield from self._kl(mismatched(batch.rows, self._longest))
        desirable = [row.role is Role.DESIRABLE for row in batch.rows]
        good, bad = sum(desirable), len(desirable) - sum(desirable)
        return lambda places: KtoObjective(
            self._method,
            [desirable[place] for place in places],
            [reference[place] for place in places],
            kl,
            good,
            bad,
        )

    def _kl(self, rows: Sequence[TrainRow]) -> Turns[float]:
        """z0: how far the model has gone from its reference on answers that it was not asked for; never below 0."""
        if not rows:
            return 0.0
        now = yield from self.job.score(rows, self.job.key)
        before = yield from self.reference.score(rows)
        return max(0.0, fmean(score - reference for score, reference in zip(now, before, strict=True)))


def mismatched(rows: Sequence[TrainRow], longest: int) -> list[TrainRow]:
    """Each row's prompt with the answer of the row before it (the first's with the last's), cut at `longest` tokens.

    A row's prompt ends before its first target. A single row has no other's answer: nothing.
    """
    if len(rows) < 2:
        return []
    starts = [next((place for place, target in enumerate(row.mask) if target), len(row.mask)) for row in rows]
    made = []
    for place, row in enumerate(rows):
        prompt, other, start = row.tokens[: starts[place]], rows[place - 1], starts[place - 1]
        tokens = [*prompt, *other.tokens[start:]]
        mask = [*[False] * len(prompt), *other.mask[start:]]
        made.append(TrainRow(tokens[:longest], mask[:longest], row.role, row.line))
    return made
