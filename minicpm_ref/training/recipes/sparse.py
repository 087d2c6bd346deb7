"""The embedded sparse variant: the base continued from short dense to long block-sparse sequences.

The short-to-long recipe of InfLLM-V2, scaled down by 8 in length: pre-training was dense at 512 tokens; this run goes
up to 4096, where a token sees 24 of 256 blocks, through the same `sparse_attention` that inference uses (dense below
`dense_len`, as published). Lengths come in buckets of equal token shares. The published run starts from a model that
can already look things up; the base is too small and too briefly trained for that, so the first part of the run uses
the shortest bucket alone, which is dense, and learns it there.

Part of the rows carry planted facts and questions (`retrieval`), and their answers weigh more than other tokens: plain
code gives so small a model hardly any reason to look far back.
Source: arXiv 2509.24663 section 4 (length buckets, same weights dense and sparse).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from minicpm_ref.checkpoint import variant_folder
from minicpm_ref.config import SparseConfig
from minicpm_ref.data import Corpus
from minicpm_ref.model import MiniCPM
from minicpm_ref.tokenizer import Tokenizer
from minicpm_ref.training.planted_facts import Planter, planted_batch
from minicpm_ref.training.recipe import Recipe
from minicpm_ref.training.recipes.base import CONFIG

# The published ratios (block 4 strides, kernel 2 strides) at a small block. The kernel has to be short: on a pilot
# model, means over 16 keys lost about half of the far facts that means over 8 keys found.
SPARSE = SparseConfig(
    kernel_size=8, kernel_stride=4, init_blocks=1, block_size=16, window_size=128, topk=16, dense_len=512
)


@dataclass(frozen=True)
class SparseRecipe(Recipe):
    """Training on sequences of several lengths, some of them with planted facts.

    For the first `short_share` of the steps only the shortest of `lengths` is used. `planted_share` of the rows carry
    facts; `answer_weight` is what the mean loss of their answers adds to that of all tokens.
    """

    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    short_share: float = 0.27
    planted_share: float = 0.5
    answer_weight: float = 0.5

    def build_model(self) -> MiniCPM:
        """The parent's weights under this recipe's configuration, which has a `sparse_config`."""
        model = MiniCPM(self.config)
        model.load_state_dict(super().build_model().state_dict())
        return model

    @cached_property
    def planter(self) -> Planter:
        """Plants facts in the parent's vocabulary."""
        assert self.parent is not None
        return Planter(Tokenizer.load(variant_folder(self.parent) / "tokenizer.json"))

    def length(self, step: int) -> int:
        """Tokens a row at `step`."""
        first = int(self.short_share * self.steps)
        return self.lengths[0] if step < first else self.lengths[(step - first) % len(self.lengths)]

    def batch(self, corpus: Corpus, step: int, part: int, parts: int) -> tuple[Tensor, ...]:
        """Inputs, targets and answer weights of this process's rows, [rows, length] each.

        The weights of all answers of the step add up to the number of processes, whose losses are averaged: so each
        answer counts the same wherever it falls.
        """
        length = self.length(step)
        rows = self.batch_tokens // length
        if rows % parts:
            raise ValueError(f"{rows} rows of {length} tokens cannot be shared by {parts} processes")
        rng = np.random.default_rng((self.seed, step))
        mine = slice(part * rows // parts, (part + 1) * rows // parts)
        inputs, targets, answers = planted_batch(corpus.tokens, self.planter, rows, length, self.planted_share, rng)
        weights = answers * (parts / max(1, int(answers.sum())))
        return inputs[mine], targets[mine], weights[mine]

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """Mean cross-entropy of all tokens, in nats, plus `answer_weight` times that of the answers."""
        inputs, targets, weights = batch
        losses = F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten(), reduction="none")
        return losses.mean() + self.answer_weight * (losses * weights.flatten()).sum()


RECIPE = SparseRecipe(
    name="sparse",
    config=replace(CONFIG, sparse_config=SPARSE),
    tokens=4_000_000,
    context=4096,
    lr=0.004,
    matrix_lr=0.008,
    warmup_tokens=100_000,
    decay=0.5,
    seed=3,
    parent="base",
)
