"""The coordinate check: does every layer move by the same amount at every width?

muP is a promise about sizes. If it is kept, then after a few steps of training each activation, and each *change* of an
activation since the start, has the same typical size at width 64 and at width 512. So: train a few steps at several
widths, note the sizes, draw them against the width on logarithmic axes. A flat line is a promise kept; a slope s means
growth like width^s, and sooner or later one rate cannot serve two widths.

Logits are the slowest to become flat. The first steps add up gradients of no common direction, whose sum grows only
like the square root of the width; the part of the logits that falls with the width is -1/3 in slope after one step and
still -0.1 after five, most of it below width 256. So they have a wider limit than the layers.

It costs seconds and finds what a sweep would find in hours: a forgotten logit factor, a rate that was not divided, a
factor applied twice. It does not see weight decay, which acts too slowly (rate x decay has a test of its own).

Sources: Yang et al., arXiv 2203.03466 appendix D.1; github.com/microsoft/mup (coordinate checking).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minicpm_ref.config import ModelConfig
from minicpm_ref.model import MiniCPM
from minicpm_ref.training.optimizers import build_optimizers
from minicpm_ref.wind_tunnel.candidate import Candidate

WIDTHS = (64, 128, 256, 512)
FLAT = 0.1  # |slope| up to here counts as flat ...
LOGITS = 2  # ... and this many times it for the logits

Optimizers = Callable[[MiniCPM, ModelConfig, Candidate], list[torch.optim.Optimizer]]


@dataclass(frozen=True)
class Size:
    """The mean |value| of one place at one width after one step: of the activation, and of its change since step 0."""

    form: str
    width: int
    step: int
    place: str
    activation: float
    change: float


def usual_optimizers(model: MiniCPM, config: ModelConfig, candidate: Candidate) -> list[torch.optim.Optimizer]:
    """The trainer's own groups."""
    return build_optimizers(
        model, config, candidate.optimizer, candidate.lr, candidate.matrix_lr, candidate.weight_decay
    )


def coordinate_check(
    candidate: Candidate,
    widths: Sequence[int] = WIDTHS,
    steps: int = 5,
    seeds: Sequence[int] = (0, 1),
    vocab_size: int = 256,
    optimizers: Optimizers = usual_optimizers,
) -> list[Size]:
    """Train `candidate` at each width for `steps` steps on one batch of random tokens; the sizes after every step.

    The tokens are the same for all widths. Places: "embedding", "layer 1" ..., "final" (normed) and "logits".
    `optimizers` replaces the trainer's groups, to see what a mistake in them looks like.

    >>> sizes = coordinate_check(Candidate(64, 64, 0, 2.0**-6), widths=(64, 128), steps=1, seeds=(0,))
    >>> sorted({size.place for size in sizes})
    ['embedding', 'final', 'layer 1', 'layer 2', 'logits']
    """
    ids = torch.randint(0, vocab_size, (8, 33), generator=torch.Generator().manual_seed(0))
    result = []
    for width in widths:
        rows: dict[tuple[int, str], list[tuple[float, float]]] = {}
        for seed in seeds:
            chosen = replace(candidate, width=width, seed=seed, context=64)
            model = chosen.recipe(vocab_size).build_model()
            trained = optimizers(model, model.config, chosen)
            before = _places(model, ids)
            for step in range(1, steps + 1):
                loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
                loss.backward()
                for optimizer in trained:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                for place, value in _places(model, ids).items():
                    sizes = value.abs().mean().item(), (value - before[place]).abs().mean().item()
                    rows.setdefault((step, place), []).append(sizes)
        for (step, place), values in rows.items():
            activation, change = np.mean(values, axis=0).tolist()
            result.append(Size(candidate.parametrization, width, step, place, activation, change))
    return result


@torch.no_grad()
def _places(model: MiniCPM, ids: Tensor) -> dict[str, Tensor]:
    """The activations at every place, on the training batch."""
    states = model.hidden_states(ids[:, :-1])
    names = ["embedding", *(f"layer {i}" for i in range(1, len(states) - 1)), "final"]
    return dict(zip(names, states, strict=True)) | {"logits": model.logits(states[-1])}


def slopes(sizes: Sequence[Size], step: int | None = None) -> dict[str, float]:
    """d log(change) / d log(width) of every place after `step` (default: the last): 0 is flat, 1 grows like the width,
    NaN where nothing has moved yet.

    Raises ValueError when there are fewer than two widths.
    """
    step = max(size.step for size in sizes) if step is None else step
    result = {}
    for place in dict.fromkeys(size.place for size in sizes):
        points = [(size.width, size.change) for size in sizes if size.place == place and size.step == step]
        if len({width for width, _ in points}) < 2:
            raise ValueError(f"{place}: sizes at {len(points)} width(s), expected at least 2")
        if min(change for _, change in points) == 0:  # the output matrix starts at 0, so step 1 moves nothing below it
            result[place] = math.nan
            continue
        x, y = np.log(np.array(points)).T
        result[place] = float(np.polyfit(x, y, 1)[0])
    return result


def drifting(sizes: Sequence[Size], limit: float = FLAT) -> dict[str, float]:
    """The places whose slope exceeds `limit` (logits: twice that) in either direction: empty when the check passes."""
    limits = {"logits": LOGITS * limit}
    return {place: slope for place, slope in slopes(sizes).items() if not abs(slope) < limits.get(place, limit)}
