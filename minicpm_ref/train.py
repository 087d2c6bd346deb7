"""What `minicpm-ref train` does: a recipe by name, with the changes a command line may make, run in this process."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from minicpm_ref.data import Corpus
from minicpm_ref.training import Recipe, Trainer, keep_freed_memory
from minicpm_ref.training.recipes import get_recipe, get_trainer


def run(
    name: str, corpus: Path, folder: Path, tokens: int | None, seed: int | None, device: str, sharding: str
) -> None:
    """Train recipe `name` on the corpus, with everything it writes in `folder`; None keeps the recipe's number."""
    recipe: Recipe = get_recipe(name)
    if tokens is not None:
        recipe = dataclasses.replace(recipe, tokens=tokens)
    if seed is not None:
        recipe = dataclasses.replace(recipe, seed=seed)
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device == "cpu":
        keep_freed_memory()  # this process trains and ends
    trainer: type[Trainer] = get_trainer(name)
    trainer(recipe, Corpus(corpus), folder, device, sharding).run()
