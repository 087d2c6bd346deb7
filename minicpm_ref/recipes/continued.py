"""The control of the ternary variant: the same further training as `ternary_qat`, in full precision.

The base has not converged, so any further training improves it, ternary or not. What ternary weights cost is therefore
the gap to this run, which reads the same tokens in the same order at the same rates, and not the gap to the base. It
is also the teacher of the distillation that follows (`ternary`). Its weights are not embedded.
"""

from minicpm_ref.recipes import ternary_qat
from minicpm_ref.train import Recipe

QAT = ternary_qat.RECIPE

RECIPE = Recipe(
    name="continued",
    config=QAT.config,
    tokens=QAT.tokens,
    lr=QAT.lr,
    matrix_lr=QAT.matrix_lr,
    warmup=QAT.warmup,
    decay=QAT.decay,
    seed=QAT.seed,
    parent=QAT.parent,
)
