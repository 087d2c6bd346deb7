"""The embedded ternary variant: distillation from full precision, after quantization-aware training has converged.

Two decoupled stages. `ternary_qat` comes first and is left to finish; then this short run starts from its float32
weights and asks the ternary student to match the whole distribution that a full-precision teacher gives for every next
token, besides the token itself. Distilling during QAT would aim at two moving things at once, and the report found it
worse. The report also found that a teacher's quality matters most; the teacher is the embedded base, which read more
tokens than the student.

Run `minicpm-ref train --recipe ternary_qat` before this one.
Source: MiniCPM4 technical report (arXiv 2506.07900) section 3.3; Hinton et al., arXiv 1503.02531 (the loss).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicpm_ref.model import MiniCPM
from minicpm_ref.training.recipe import load_parent, read_state
from minicpm_ref.training.recipes.base import CONFIG
from minicpm_ref.training.recipes.ternary_qat import TernaryRecipe


@dataclass(frozen=True)
class DistillationRecipe(TernaryRecipe):
    """Training from the weights of the finished run in folder `start` towards the predictions of `teacher`, an embedded
    variant or a folder.

    `teacher_share` weighs the teacher's distribution against the true next token.
    """

    start: str = "runs/ternary_qat"
    teacher: str = "base"
    teacher_share: float = 0.5

    def build_model(self) -> MiniCPM:
        """The model that the run in `start` ended with, its float32 weights included."""
        model = self.wrap(MiniCPM(self.config))
        model.load_state_dict(read_state(self.start).weights)
        return model

    @cached_property
    def teacher_model(self) -> MiniCPM:
        """The teacher, in full precision."""
        return load_parent(self.teacher)

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """Cross-entropy against the next token and against the teacher's distribution, in nats a token."""
        inputs, targets = batch
        with torch.no_grad():
            soft = self.teacher_model.to(inputs.device)(inputs).softmax(-1).flatten(0, 1)
        logits = model(inputs).float().flatten(0, 1)
        hard_loss = F.cross_entropy(logits, targets.flatten())
        soft_loss = F.cross_entropy(logits, soft)
        return (1 - self.teacher_share) * hard_loss + self.teacher_share * soft_loss


RECIPE = DistillationRecipe(
    name="ternary",
    config=CONFIG,
    tokens=2_458_000,
    batch_tokens=8192,
    lr=0.003,
    matrix_lr=0.006,
    warmup_tokens=100_000,
    decay=0.8,
    seed=2,
    parent="stable",
)
