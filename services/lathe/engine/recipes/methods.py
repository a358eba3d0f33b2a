"""Which recipe trains by which method."""

from __future__ import annotations

from lathe.common.errors import InvalidArgument
from lathe.engine.model import Method, Supervised
from lathe.engine.recipes.recipe import Recipe
from lathe.engine.recipes.sft import SupervisedRecipe

RECIPES: dict[type[Method], type[Recipe]] = {Supervised: SupervisedRecipe}


def recipe_of(method: Method) -> type[Recipe]:
    """Raises InvalidArgument for a method that this engine has no recipe for."""
    recipe = RECIPES.get(type(method))
    if recipe is None:
        name = type(method).__name__.lower()
        raise InvalidArgument(f"method: this engine does not train by {name}.", reason="UNKNOWN_METHOD")
    return recipe
