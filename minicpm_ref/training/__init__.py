"""The trainer: recipes, optimizers, exact resume, cards.

`recipe` says what determines a run, `trainer` runs it, `card` records what came out; `recipes/` holds one file for each
set of embedded weights.
"""

from minicpm_ref.training.recipe import Recipe, load_parent, read_state
from minicpm_ref.training.trainer import Trainer, complete, keep_freed_memory

__all__ = ["Recipe", "Trainer", "complete", "keep_freed_memory", "load_parent", "read_state"]
