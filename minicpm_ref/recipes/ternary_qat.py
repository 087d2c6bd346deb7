"""Quantization-aware training of the embedded base: the first stage of its ternary variant.

Every linear layer inside the blocks multiplies by its weight rounded to {-s, 0, s}, and the float32 weight below learns
through the straight-through estimator. The schedule starts anew, as in the MiniCPM4 report: the rate is warmed up to
half of the base's peak, held, and decayed to zero. Base and this run together read R tokens; the report finds that QAT
needs about 40 % of R to match QAT from the start (`studies.ternary_ablation` measures that curve on a smaller
model); this run takes about 30 %.

The seed differs from the base's, so that the batches are not the ones the base began with.
Source: MiniCPM4 technical report (arXiv 2506.07900) section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

from minicpm_ref.model import MiniCPM
from minicpm_ref.recipes.base import CONFIG
from minicpm_ref.ternary_layers import quantization_aware, to_ternary
from minicpm_ref.train import Recipe


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
    tokens=3_300_000,
    lr=0.005,
    matrix_lr=0.01,
    warmup=0.05,
    decay=0.4,
    seed=1,
    parent="base",
)
