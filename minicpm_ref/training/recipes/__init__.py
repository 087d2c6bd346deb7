"""One small file a recipe; each exposes `RECIPE`, and `TRAINER` if it trains something else than a decoder."""

from __future__ import annotations

import importlib
import pkgutil

from minicpm_ref.training.recipe import Recipe
from minicpm_ref.training.trainer import Trainer


def recipe_names() -> list[str]:
    """Names of all recipes."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError listing the names."""
    if name not in recipe_names():
        raise ValueError(f"recipe {name!r}: expected one of {', '.join(recipe_names())}")
    return importlib.import_module(f"{__name__}.{name}").RECIPE


def get_trainer(name: str) -> type[Trainer]:
    """What runs the recipe of that name. Raises ValueError as `get_recipe` does."""
    get_recipe(name)
    trainer: type[Trainer] = getattr(importlib.import_module(f"{__name__}.{name}"), "TRAINER", Trainer)
    return trainer
