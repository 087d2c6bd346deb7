"""Cases of sampling: from logits to probabilities.

Every switch alone, and all of them together. Two rows stand at an edge where arithmetic is exact: four equal logits
have probabilities of exactly 1/4, so top-p = 1/2 keeps the first two and no third. Ties at the edge of top-k are left
out: which of two equal logits `torch.topk` keeps is not defined.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from minicpm_ref.sampling import SamplingParams


@dataclass(frozen=True)
class ProcessLogitsCase:
    """One row: `process_logits(logits, params)` with normal logits [*shape], or with the given `numbers`."""

    name: str
    params: SamplingParams = field(default_factory=SamplingParams)
    shape: tuple[int, ...] = (37,)
    numbers: tuple[float, ...] | None = None
    seed: int = 0

    def build(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, SamplingParams]:
        """(logits [..., V], params), logits drawn in float32 on the CPU and then rounded to `dtype`."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = 2 * torch.randn(self.shape, generator=generator)
        logits = drawn if self.numbers is None else torch.tensor(self.numbers)
        return logits.to(device, dtype), self.params


_EQUAL = (0.5, 0.5, 0.5, 0.5)

PROCESS_LOGITS: tuple[ProcessLogitsCase, ...] = (
    ProcessLogitsCase("greedy"),
    ProcessLogitsCase("greedy-tie", numbers=(1.0, 3.0, 2.0, 3.0)),
    ProcessLogitsCase("greedy-ignores-the-rest", SamplingParams(0.0, top_k=3, top_p=0.5)),
    ProcessLogitsCase("plain", SamplingParams(1.0)),
    ProcessLogitsCase("cold", SamplingParams(0.3)),
    ProcessLogitsCase("hot", SamplingParams(2.0)),
    ProcessLogitsCase("top-1", SamplingParams(1.0, top_k=1)),
    ProcessLogitsCase("top-k", SamplingParams(1.0, top_k=5)),
    ProcessLogitsCase("top-k-beyond-vocabulary", SamplingParams(1.0, top_k=100)),
    ProcessLogitsCase("top-p", SamplingParams(1.0, top_p=0.7)),
    ProcessLogitsCase("top-p-tiny-keeps-one", SamplingParams(1.0, top_p=1e-4)),
    ProcessLogitsCase("top-p-at-the-edge", SamplingParams(1.0, top_p=0.5), numbers=_EQUAL),
    ProcessLogitsCase("top-p-past-the-edge", SamplingParams(1.0, top_p=0.51), numbers=_EQUAL),
    ProcessLogitsCase("temperature-before-top-p", SamplingParams(0.5, top_p=0.8)),
    ProcessLogitsCase("top-k-before-top-p", SamplingParams(1.5, top_k=6, top_p=0.6)),
    ProcessLogitsCase("one-logit", SamplingParams(0.7, top_p=0.9), shape=(1,)),
    ProcessLogitsCase("rows", SamplingParams(0.8, top_k=9, top_p=0.9), shape=(2, 3, 29)),
)
