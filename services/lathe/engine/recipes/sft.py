"""Supervised tuning: maximum likelihood of the trained tokens, averaged over those of the whole batch."""

from __future__ import annotations

from lathe.engine.batch import CrossEntropy, trained_tokens
from lathe.engine.recipes.recipe import Batch, Objectives, Recipe
from lathe.engine.recipes.turns import Turns


class SupervisedRecipe(Recipe):
    """Chat, completions and continued pretraining alike: the rows' masks say which tokens are trained."""

    def objectives(self, batch: Batch) -> Turns[Objectives]:
        yield from ()
        objective = CrossEntropy(sum(trained_tokens(row) for row in batch.rows))
        return lambda places: objective
