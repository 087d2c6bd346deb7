"""Cases of speculative decoding: rounds small enough to follow by hand.

Each row is one decision and its edge: a draft that passes, one that fails, the strict side of the test (a uniform of
exactly 0 and a token of probability 0), a draft that nothing follows, all accepted and the extra token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class SampledChainCase:
    """One row: `accept_sampled_chain(p, q, y, uniforms)`, all numbers given."""

    name: str
    p: tuple[tuple[float, ...], ...]
    q: tuple[tuple[float, ...], ...]
    y: tuple[int, ...]
    uniforms: tuple[float, ...]

    def build(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[Any, ...]:
        """(p [g + 1, V], q [g, V], y [g], uniforms [g + 1]) as lists; laws are always float64."""
        return [list(row) for row in self.p], [list(row) for row in self.q], list(self.y), list(self.uniforms)


@dataclass(frozen=True)
class ChainGainCase:
    """One row: `chain_gain(acceptance)`."""

    name: str
    acceptance: tuple[float, ...]

    def build(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[list[float]]:
        """(acceptance [g],) as a list."""
        return (list(self.acceptance),)


_P, _Q, _NEXT = (0.5, 0.3, 0.2), (0.2, 0.7, 0.1), (0.25, 0.25, 0.5)

ACCEPT_SAMPLED_CHAIN: tuple[SampledChainCase, ...] = (
    SampledChainCase("passes", (_P, _NEXT), (_Q,), (1,), (0.4, 0.6)),
    SampledChainCase("fails-and-the-residual-speaks", (_P, _NEXT), (_Q,), (1,), (0.5, 0.7)),
    SampledChainCase("residual-not-target", (_P, _NEXT), (_Q,), (1,), (0.9, 0.6)),
    SampledChainCase("residual-last-token", (_P, _NEXT), (_Q,), (1,), (0.9, 0.8)),
    SampledChainCase("a-draft-that-q-underrates", (_P, _NEXT), (_Q,), (0,), (0.99, 0.0)),
    SampledChainCase("never-for-probability-zero", ((0.0, 1.0), (0.5, 0.5)), ((0.5, 0.5),), (0,), (0.0, 0.5)),
    SampledChainCase("two-pass-and-one-more", (_P, _P, _NEXT), (_Q, _Q), (0, 1), (0.9, 0.1, 0.3)),
    SampledChainCase("the-second-fails", (_P, _P, _NEXT), (_Q, _Q), (0, 1), (0.9, 0.8, 0.9)),
    SampledChainCase("nothing-after-a-failure", (_P, _P, _NEXT), (_Q, _Q), (1, 0), (0.8, 0.0, 0.1)),
    SampledChainCase("no-draft", (_P,), (), (), (0.6,)),
)

CHAIN_GAIN: tuple[ChainGainCase, ...] = (
    ChainGainCase("no-draft", ()),
    ChainGainCase("one", (0.6,)),
    ChainGainCase("constant", (0.7, 0.7, 0.7, 0.7)),
    ChainGainCase("falling", (0.8, 0.6, 0.4)),
    ChainGainCase("never", (0.0, 0.9)),
    ChainGainCase("always", (1.0, 1.0, 1.0)),
)
