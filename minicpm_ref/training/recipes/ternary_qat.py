"""Quantization-aware training: the first stage of the ternary variant, branching off the base's stable phase.

Every linear layer inside the blocks multiplies by its weight rounded to {-s, 0, s}, and the float32 weight below learns
through the straight-through estimator. The run starts where the base's learning rate is still at its peak, before the
decay that makes weights settle: rounding a settled model breaks more, and it leaves its places less willingly. The
MiniCPM4 report warms the rate up to half of the peak again because it starts from a finished model.

The control comes for nothing: the base's own branch that decays after 50 million tokens (`minicpm-ref train --recipe
base --tokens 50000000`) has read as many tokens as this run, its parent, and the distillation that follows (`ternary`)
together, and the two differ in nothing but the weights' precision. The report finds that QAT needs about 40 % of all
tokens to match QAT from the start; here both ternary stages are 35 %.

The seed differs from the base's, so that the batches are not the ones the base began with.
Source: MiniCPM4 technical report (arXiv 2506.07900) section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

from minicpm_ref.lowbit.layers import quantization_aware, to_ternary
from minicpm_ref.model import MiniCPM
from minicpm_ref.training.recipe import Recipe
from minicpm_ref.training.recipes.base import CONFIG


@dataclass(frozen=True)
class TernaryRecipe(Recipe):
    """Training through `fake_quantize` on one of `ternary.GRIDS`, in groups of `group_size` weights."""

    group_size: int = 128
    grid: str = "ternary"

    def build_model(self) -> MiniCPM:
        """The model at step 0, with every linear layer inside the blocks quantization-aware."""
        return self.wrap(super().build_model())

    def wrap(self, model: MiniCPM) -> MiniCPM:
        """`model`, quantization-aware in place."""
        quantization_aware(model, self.group_size, self.grid)
        return model

    def finished(self, model: MiniCPM) -> MiniCPM:
        """The packed model; a grid other than ternary has no packed form and stays as trained."""
        if self.grid == "ternary":
            to_ternary(model)
        return model


RECIPE = TernaryRecipe(
    name="ternary_qat",
    config=CONFIG,
    tokens=14_000_000,
    batch_tokens=8192,
    lr=0.01,
    matrix_lr=0.02,
    warmup_tokens=250_000,
    decay=0.6,
    seed=1,
    parent="stable",
)
