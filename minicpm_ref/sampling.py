"""From logits to a token, and the plain decode loop.

Every decoder of this package (plain, speculative, engine) chooses tokens here, so that they sample from the same
distribution. `process_logits` is the definition of that distribution, the dull version: it sorts the vocabulary and
returns a probability for every token. `choose_token` is what decoders call: the same law from one uniform number,
without looking at tokens that cannot win. A vocabulary of 73448 makes the difference between 10 ms and 0.1 ms a token.

The order: logit bias, penalties for what is there already, temperature, top-k, top-p, min-p.

A request has a random generator of its own, seeded by its `seed`, and draws one number a token: its text depends on its
prompt, its parameters and its seed, never on what else a batch holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minicpm_ref.cache import KVCache
from minicpm_ref.model import MiniCPM

BAN, FORCE = -100.0, 100.0  # a bias at or beyond these is absolute
_COLDEST = 1e-30  # differences of logits over this are finite or -inf in float32, never NaN
_FIRST_LOOK = 1024  # tokens that top-p sorts before it asks whether that was enough


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token. Raises ValueError on nonsense.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 keep everything: `top_p` keeps the smallest set of
    most likely tokens that reaches this probability (0: the most likely one), `min_p` those at least this fraction as
    likely as the first. `repetition_penalty` divides the positive logits and multiplies the negative ones of tokens
    that occur in prompt or output; `frequency_penalty` is subtracted for each occurrence in the output,
    `presence_penalty` once. `logit_bias` {token id: number} is added; -100 bans a token, 100 leaves no other. `seed`
    None: another text each time.

    >>> SamplingParams(temperature=0.7, top_p=0.9, seed=1)
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        # written so that NaN fails: every comparison with NaN is false
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature = {self.temperature}: expected 0 (greedy) or more, and finite")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}: expected 0 (all tokens) or more")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: expected 0 <= top_p <= 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p = {self.min_p}: expected 0 <= min_p <= 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty = {self.repetition_penalty}: expected a positive number, 1 for none")
        for name in ("frequency_penalty", "presence_penalty"):
            if not -math.inf < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: expected a finite number")
        for token, bias in self.logit_bias.items():
            if token < 0 or math.isnan(bias):
                raise ValueError(f"logit_bias[{token}] = {bias}: expected a token id and a number")

    @property
    def edits_logits(self) -> bool:
        """Whether bias or penalties change the logits before anything else."""
        penalties = (self.repetition_penalty - 1, self.frequency_penalty, self.presence_penalty)
        return any(penalties) or bool(self.logit_bias)

    def generator(self) -> np.random.Generator:
        """The random numbers of one request; any integer is a seed."""
        return np.random.default_rng(None if self.seed is None else self.seed % 2**64)


def process_logits(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int] = (), output: Sequence[int] = ()
) -> Tensor:
    """The probabilities [..., V] that `params` makes of logits [..., V], in float32; greedy puts all mass on the first
    maximum. Of equal logits the lower id is kept first. `prompt` and `output` are the ids that penalties look at.

    Sources: top-p, Holtzman et al., arXiv 1904.09751; min-p, arXiv 2407.01082; repetition penalty, CTRL, arXiv
    1909.05858.
    """
    logits = logits.float()
    if params.edits_logits:
        logits = _edit(logits, params, prompt, output)
    if params.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # the maximum goes first: a tiny temperature then makes 0 and -inf, the limit, instead of inf - inf
    logits = (logits - logits.amax(-1, keepdim=True)) / max(params.temperature, _COLDEST)
    if 0 < params.top_k < logits.shape[-1]:
        keep = logits.sort(dim=-1, descending=True, stable=True).indices[..., : params.top_k]  # ties: the lower id
        logits = torch.full_like(logits, -torch.inf).scatter(-1, keep, logits.gather(-1, keep))
    probabilities = logits.softmax(-1)
    if params.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # mass of the more likely tokens
        ordered = ordered.masked_fill((before >= params.top_p) & (before > 0), 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    if params.min_p > 0:
        unlikely = probabilities < params.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(unlikely, 0.0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def sample(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token id [...] (int64) drawn from probabilities [..., V]."""
    flat = probabilities.reshape(-1, probabilities.shape[-1])
    return torch.multinomial(flat, 1, generator=generator).view(probabilities.shape[:-1])


def choose_token(
    logits: NDArray[np.float32],
    params: SamplingParams,
    uniform: float = 0.0,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
) -> int:
    """The token that `uniform` in [0, 1) picks from the law `process_logits(logits, params, prompt, output)`.

    logits float32 [V]. Greedy ignores `uniform`. Raises RuntimeError for logits that hold NaN or forbid every token.

    >>> choose_token(np.array([1.0, 3.0, 3.0], np.float32), SamplingParams())
    1
    """
    if params.edits_logits:
        logits = _edit(torch.from_numpy(logits), params, prompt, output).numpy()
    best = int(logits.argmax())  # NaN counts as the largest
    if not logits[best] > -math.inf:
        raise RuntimeError(f"logits[{best}] = {logits[best]} is their maximum: a model or a logit_bias is broken")
    if params.temperature == 0 or params.top_k == 1 or params.top_p == 0:
        return best
    ids, weights = _candidates(logits, params, float(logits[best]))
    if params.min_p > 0:
        likely = weights >= params.min_p * weights.max()
        ids, weights = (None if ids is None else ids[likely]), weights * likely if ids is None else weights[likely]
    upper = weights.cumsum()
    # token i owns [sum before i, sum with i) of the total, so a weight of 0 is never drawn; a product that rounds up to
    # the total belongs to the last token of positive weight
    place = int(min(np.searchsorted(upper, uniform * upper[-1], "right"), np.searchsorted(upper, upper[-1], "left")))
    return place if ids is None else int(ids[place])


def _candidates(
    logits: NDArray[np.float32], params: SamplingParams, top: float
) -> tuple[NDArray[np.int64] | None, NDArray[np.float64]]:
    """Ids and unnormalised weights that top-k and top-p leave over; ids None: all tokens in order."""
    temperature = max(params.temperature, _COLDEST)
    vocabulary = logits.shape[0]
    if 0 < params.top_k < vocabulary:
        ids = _first(logits, params.top_k)
        weights = np.exp((logits[ids].astype(np.float64) - top) / temperature)
        total = weights.sum()
    else:
        everything = np.exp((logits.astype(np.float64) - top) / temperature)
        if params.top_p == 1:
            return None, everything
        total, look = everything.sum(), _FIRST_LOOK
        ids = _first(logits, min(look, vocabulary))
        while everything[ids].sum() < params.top_p * total and len(ids) < vocabulary:
            look *= 8  # a flat distribution
            ids = _first(logits, min(look, vocabulary))
        weights = everything[ids]
    if params.top_p < 1:
        order = np.argsort(-weights, kind="stable")  # ids ascend, so equal weights keep the lower id first
        ids, weights = ids[order], weights[order]
        before = weights.cumsum() - weights
        kept = (before < params.top_p * total) | (before == 0)
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def _first(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Ids of the `count` largest logits, ascending; of equal ones the lower ids."""
    edge = torch.topk(torch.from_numpy(logits), count, sorted=False).values.min().item()
    above = np.flatnonzero(logits > edge)
    level = np.flatnonzero(logits == edge)[: count - len(above)]
    return np.sort(np.concatenate((above, level)))


def _edit(logits: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """A copy of logits [..., V] with bias and penalties applied."""
    logits = logits.clone()
    vocabulary = logits.shape[-1]
    if params.logit_bias and max(params.logit_bias) >= vocabulary:
        raise ValueError(f"logit_bias names token {max(params.logit_bias)}: expected ids below {vocabulary}")
    forced = [token for token, bias in params.logit_bias.items() if bias >= FORCE]
    if forced:
        others = torch.ones(vocabulary, dtype=torch.bool, device=logits.device)
        others[forced] = False
        logits.masked_fill_(others, -torch.inf)
    for token, bias in params.logit_bias.items():
        logits[..., token] += -math.inf if bias <= BAN else bias
    if params.repetition_penalty != 1 and (len(prompt) or len(output)):
        seen = torch.tensor(sorted({*prompt, *output}), device=logits.device)
        old = logits[..., seen]
        logits[..., seen] = torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    if (params.frequency_penalty or params.presence_penalty) and len(output):
        counts = torch.bincount(torch.tensor(list(output)), minlength=vocabulary).to(logits)
        logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    return logits


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
    for a batch. `minicpm_ref.Engine` is the fast way to do the same.

    >>> model, tokenizer = load()
    >>> ids = torch.tensor([tokenizer.encode("import os")])
    >>> print(tokenizer.decode(list(generate(model, ids, 20))))
    """
    if input_ids.shape[0] != 1:
        raise ValueError(f"input_ids has {input_ids.shape[0]} rows: generate continues one sequence, expected [1, T]")
    params = params or SamplingParams()
    random = params.generator()
    total = input_ids.shape[1] + max_new_tokens
    cache = KVCache(model.config, 1, total, model.device, model.dtype) if use_cache else None
    new_ids, prompt = input_ids, input_ids[0].tolist()
    output: list[int] = []
    for _ in range(max_new_tokens):
        logits = model(new_ids, cache, last=True)[0, 0].float().cpu().numpy()  # [V]
        token = choose_token(logits, params, random.random(), prompt, output)
        if token in stop_ids:
            return
        yield token
        output.append(token)
        last = torch.tensor([[token]], device=input_ids.device)
        new_ids = last if use_cache else torch.cat((new_ids, last), dim=1)
