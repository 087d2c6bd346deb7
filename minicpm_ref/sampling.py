"""From logits to a token, and the plain decode loop.

Every decoder of this package (plain, speculative, engine) processes logits here, so that they sample from the same
distribution. The order is the usual one: temperature, then top-k, then top-p on what is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minicpm_ref.cache import KVCache
from minicpm_ref.model import MiniCPM


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token: `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep everything. Raises ValueError on
    nonsense."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature = {self.temperature}: expected 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}: expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: expected 0 < top_p <= 1")


def process_logits(logits: Tensor, params: SamplingParams) -> Tensor:
    """The probabilities [..., V] that `params` makes of logits [..., V], in float32; greedy puts all mass on the first
    maximum.

    top-p keeps the smallest set of most likely tokens whose probability reaches `top_p` (Holtzman et al., arXiv
    1904.09751).
    """
    logits = logits.float()
    if params.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        keep = logits.sort(dim=-1, descending=True, stable=True).indices[..., : params.top_k]  # ties: the lower id
        logits = torch.full_like(logits, -torch.inf).scatter(-1, keep, logits.gather(-1, keep))
    probabilities = logits.softmax(-1)
    if params.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # mass of the more likely tokens
        ordered = ordered.masked_fill(before >= params.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def sample(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token id [...] (int64) drawn from probabilities [..., V]."""
    flat = probabilities.reshape(-1, probabilities.shape[-1])
    return torch.multinomial(flat, 1, generator=generator).view(probabilities.shape[:-1])


@torch.no_grad()
def generate(
    model: MiniCPM,
    input_ids: Tensor,
    max_new_tokens: int,
    params: SamplingParams | None = None,
    stop_ids: Sequence[int] = (),
    use_cache: bool = True,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` token ids that continue `input_ids` [1, T], one at a time, ending before any of
    `stop_ids`.

    `use_cache=False` recomputes the whole sequence for every token: the naive loop, for comparison. Raises ValueError
    for a batch.
    """
    if input_ids.shape[0] != 1:
        raise ValueError(f"input_ids has {input_ids.shape[0]} rows: generate continues one sequence, expected [1, T]")
    params = params or SamplingParams()
    generator = None
    if params.seed is not None:
        generator = torch.Generator(model.device).manual_seed(params.seed)
    total = input_ids.shape[1] + max_new_tokens
    cache = KVCache(model.config, 1, total, model.device, model.dtype) if use_cache else None
    new_ids = input_ids
    for _ in range(max_new_tokens):
        logits = model(new_ids, cache)[:, -1]  # [1, V]
        token = sample(process_logits(logits, params), generator)  # [1]
        if token.item() in stop_ids:
            return
        yield int(token)
        new_ids = token[:, None] if use_cache else torch.cat((new_ids, token[:, None]), dim=1)
