"""Which recipe trains by which method."""

from __future__ import annotations

from lathe.engine.model import Dpo, Kto, Method, Orpo, Supervised
from lathe.engine.recipes.dpo import DpoRecipe
from lathe.engine.recipes.kto import KtoRecipe
from lathe.engine.recipes.orpo import OrpoRecipe
from lathe.engine.recipes.recipe import Recipe
from lathe.engine.recipes.sft import SupervisedRecipe

RECIPES: dict[type[Method], type[Recipe]] = {
    Supervised: SupervisedRecipe,
    Dpo: DpoRecipe,
    Orpo: OrpoRecipe,
    Kto: KtoRecipe,
}


def recipe_of(method: Method) -> type[Recipe]:
    return RECIPES[type(method)]
