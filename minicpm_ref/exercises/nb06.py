"""Checkers of 06_block_sparse_attention: FLOPs a byte of a union tile, merging by log-sum-exp, inverted lists."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minicpm_ref.exercises import attempt


def check_intensity(intensity: Callable[..., float]) -> str:
    """Check `intensity(tokens, group, overlap, width)`: useful FLOPs a byte of a tile that walks a union of lists."""

    def check() -> None:
        for what, arguments, expected in (
            ("one token of 16 heads, 16 bits: every number serves 2 FLOPs a head", (1, 16, 1.0), 16.0),
            ("one token without groups", (1, 1, 1.0), 1.0),
            ("four tokens that share everything", (4, 16, 1.0), 64.0),
            ("four tokens that share half", (4, 16, 2.0), 32.0),
            ("four tokens that share nothing are no better than one", (4, 16, 4.0), 16.0),
            ("a cache of 8 bits", (1, 16, 1.0, 1), 32.0),
        ):
            found = intensity(*arguments)
            assert math.isclose(found, expected), f"{what}: {found}, expected {expected}"

    return attempt("intensity", check)


def check_merge(merge: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> str:
    """Check `merge(outs [P, D], lses [P])` -> (out [D], lse): the parts of a list, weighted by their log-sum-exp."""

    def check() -> None:
        generator = torch.Generator().manual_seed(0)
        for what, shift, empty in (
            ("three parts", 0.0, ()),
            ("lse around 1000: exp overflows", 1000.0, ()),
            ("lse around -1000: exp underflows", -1000.0, ()),
            ("an empty part", 0.0, (1,)),
            ("nothing but empty parts", 0.0, (0, 1, 2)),
        ):
            scores = torch.randn(3, 5, generator=generator) + shift
            values = torch.randn(3, 5, 4, generator=generator)
            outs, lses = (scores.softmax(-1)[:, None] @ values)[:, 0], scores.logsumexp(-1)  # [P, D], [P]
            kept = [p for p in range(3) if p not in empty]
            outs[list(empty)], lses[list(empty)] = math.nan, -math.inf
            out, lse = merge(outs, lses)
            if kept:
                expected, expected_lse = scores[kept].flatten().softmax(-1) @ values[kept].flatten(0, 1), scores[kept]
                whole = expected_lse.flatten().logsumexp(-1)
            else:
                expected, whole = torch.zeros(4), torch.tensor(-math.inf)
            assert torch.allclose(out, expected, rtol=1e-4, atol=1e-5), f"{what}: out {out}, expected {expected}"
            assert torch.allclose(torch.as_tensor(lse), whole, rtol=1e-5), f"{what}: lse {lse}, expected {whole}"

    return attempt("merge", check)


def check_invert(invert: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> str:
    """Check `invert(blocks [T, K], count)` -> (tokens, start): who listed each block, in ascending order."""

    def check() -> None:
        generator = torch.Generator().manual_seed(0)
        for tokens, slots, count in ((6, 2, 3), (1, 1, 1), (40, 5, 9), (200, 3, 50)):
            lists = [torch.randperm(count, generator=generator)[:slots].tolist() for _ in range(tokens)]
            blocks = torch.tensor([listed + [-1] * (slots - len(listed)) for listed in lists], dtype=torch.int32)
            blocks[torch.rand(blocks.shape, generator=generator) < 0.3] = -1
            found, start = invert(blocks, count)
            assert len(start) == count + 1, f"start has {len(start)} entries, expected {count + 1}"
            assert len(found) == (blocks >= 0).sum(), f"{len(found)} entries, but {int((blocks >= 0).sum())} are not -1"
            for n in range(count):
                listing = found[int(start[n]) : int(start[n + 1])].tolist()
                expected = [t for t in range(tokens) if n in blocks[t].tolist()]
                assert sorted(listing) == expected, f"block {n} is listed by {expected}, not by {listing}"
                assert listing == expected, f"block {n}: the order {listing} is not ascending, so sums change"

    return attempt("invert", check)
