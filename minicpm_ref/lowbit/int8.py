"""Eight-bit weights: a code from -127 to 127 and one float16 scale for 32 of them, 8.5 bits a weight.

The problem: half of 16 bits without anybody noticing. The idea: in a group of 32 neighbours the largest decides the
scale, and each weight is off by at most half a step of it, 1/254 of the largest. These are the numbers of GGUF's
Q8_0. Left out: a scale for a whole row, which saves 0.5 bits and lets one outlier coarsen thousands of weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minicpm_ref.lowbit.ternary import split_groups


def quantize_int8(w: Tensor, group_size: int = 32, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] in -127..127 and scales float16 [out, in / group_size] of w [out, in]; `dequantize` is that
    of `ternary`.

    A group of zeros, or of weights too small for a float16 scale, gets scale 0 and codes 0. Raises ValueError, naming
    the tensor, for NaN or infinite weights, a scale beyond float16, and an `in` that is no multiple of `group_size`.

    >>> codes, scales = quantize_int8(torch.tensor([[0.5, -1.27, 0.011, 0.0]]), group_size=4)
    >>> codes.tolist()  # the scale is 0.01
    [[50, -127, 1, 0]]
    """
    groups = split_groups(w, group_size, name).float()  # [out, in / g, g]
    return round_to_scales(groups, groups.abs().amax(-1) / 127, -127, 127, name)


def round_to_scales(groups: Tensor, scales: Tensor, low: int, high: int, name: str) -> tuple[Tensor, Tensor]:
    """The nearest codes in low..high, int8 [out, in], of groups [out, in / g, g] for given scales [out, in / g], and
    these as float16. Rounded half to even. Raises ValueError for a scale that is not finite in float16."""
    halves = to_half(scales, name)
    # the codes answer to the scale that is stored, not to the one that was meant
    steps = halves.float().unsqueeze(-1)
    codes = torch.where(steps == 0, 0.0, groups / torch.where(steps == 0, 1.0, steps))
    return codes.round().clamp(low, high).flatten(1).to(torch.int8), halves


def to_half(values: Tensor, name: str) -> Tensor:
    """Scales or minimums in float16. Raises ValueError, naming the tensor, where they are not finite in it."""
    halves = values.half()
    if not halves.isfinite().all():
        raise ValueError(f"{name}: holds NaN, infinity, or a group whose scale is beyond float16 (65504)")
    return halves
