"""Odds ratio preference optimisation: supervised learning of the chosen answers and a penalty on the rejected ones.

Hong, Lee and Thorne 2024, "ORPO: Monolithic Preference Optimization without Reference Model" (arXiv:2403.07691), eq. 6
and 7. It needs no reference. The likelihood of the chosen rows is the mean over the batch's trained tokens, as in
supervised learning; log p in the odds is a row's mean over its tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lathe.engine.batch import RowLoss, trained_tokens
from lathe.engine.model import Orpo
from lathe.engine.recipes.preference import PAIR, check_roles, pair_figures, shares, split_pairs
from lathe.engine.recipes.recipe import Batch, Job, Objectives, Recipe
from lathe.engine.recipes.turns import Turns

_MIDDLE = -math.log(2)


@dataclass(frozen=True, slots=True)
class OrpoObjective:
    """Of a slice of whole pairs. pairs, chosen_tokens: of the whole batch, the latter in its chosen rows."""

    method: Orpo
    pairs: int
    chosen_tokens: int

    def __call__(self, sums: Tensor, counts: Tensor) -> RowLoss:
        means = sums / counts.clamp(min=1)
        chosen, rejected = split_pairs(means)
        log_odds = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
        log_ratio = logsigmoid(log_odds)
        likelihood = -split_pairs(sums)[0].sum() / max(1, self.chosen_tokens)
        loss = likelihood - self.method.beta * log_ratio.sum() / self.pairs
        figures = {
            "nll_loss": likelihood.item(),
            **shares({"log_odds_ratio": log_ratio, "log_odds_chosen": log_odds}, self.pairs),
            **pair_figures(self.method.beta * chosen, self.method.beta * rejected, means, self.pairs),
        }
        return RowLoss(loss, figures)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) of x <= 0, exact on both sides of -ln 2 (Maechler 2012).

    Where e^x is 1 by rounding it is taken to be just below: the odds stay finite. Each branch is kept to its own side,
    so that neither's gradient is 0 times inf.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    far, near = torch.log1p(-torch.exp(x.clamp(max=_MIDDLE))), torch.log(-torch.expm1(x.clamp(min=_MIDDLE)))
    return torch.where(x < _MIDDLE, far, near)


class OrpoRecipe(Recipe):
    """A pair is one unit: batch_size counts pairs."""

    unit = 2

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        method = job.config.method
        assert isinstance(method, Orpo)
        check_roles(job.data, PAIR)
        self._method = method

    def objectives(self, batch: Batch) -> Turns[Objectives]:
        yield from ()
        tokens = sum(trained_tokens(row) for row in batch.rows[0::2])
        objective = OrpoObjective(self._method, len(batch.rows) // 2, tokens)
        return lambda places: objective
