"""Four-bit weights: a code of sixteen levels and one or two float16 numbers for 32 or 128 of them.

The problem: sixteen levels are few, and -8..7 is lopsided; a scale of absmax / 7 leaves the level -8 unused, one of
absmax / 8 clips the largest weight if it is positive. Two ideas:

- *A scale with a sign* (`quantize_int4`, 4.5 bits with groups of 32). The weight of largest magnitude is put on -8
  exactly, whatever its own sign is, and the level that is missing is the one on the other side.
- *A scale and a minimum* (`quantize_int4_minimum`, 5 bits). The smallest weight stands on code 0 and the largest on 15:
  half a bit more, and no level is wasted on a group that does not lie around zero.

These are the numbers of GGUF's Q4_0 and Q4_1: rounding what such a file holds gives its codes and scales back, bit for
bit, if its writer used the same rule, which llama.cpp does where no importance matrix is given.

Left out: choosing scales by the error they cause, and making up for errors in later columns (GPTQ). Source: ggml's
quantize_row_q4_0_ref and quantize_row_q4_1_ref.
"""

from __future__ import annotations

from torch import Tensor

from minicpm_ref.lowbit.int8 import round_to_scales, to_half
from minicpm_ref.lowbit.ternary import split_groups


def quantize_int4(w: Tensor, group_size: int = 32, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] in -8..7 and scales float16 [out, in / group_size], of either sign, of w [out, in];
    `dequantize` is that of `ternary`.

    Raises ValueError, naming the tensor, for NaN or infinite weights, a scale beyond float16, and an `in` that is no
    multiple of `group_size`.

    >>> codes, scales = quantize_int4(torch.tensor([[0.1, 0.4, -0.2, 0.0]]), group_size=4)
    >>> codes.tolist(), scales.tolist()  # 0.4 is the largest: it stands on -8, so the scale is -0.05
    ([[-2, -8, 4, 0]], [[-0.04998779296875]])
    """
    groups = split_groups(w, group_size, name).float()  # [out, in / g, g]
    at = groups.abs().argmax(-1, keepdim=True)
    return round_to_scales(groups, groups.gather(-1, at).squeeze(-1) / -8, -8, 7, name)


def quantize_int4_minimum(w: Tensor, group_size: int = 32, name: str = "weight") -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [out, in] in 0..15, scales and minimums float16 [out, in / group_size] of w [out, in]: a weight is
    about code * scale + minimum.

    Raises ValueError as `quantize_int4` does.

    >>> codes, scales, minimums = quantize_int4_minimum(torch.tensor([[1.0, 1.5, 8.5, 2.1]]), group_size=4)
    >>> codes.tolist(), scales.tolist(), minimums.tolist()
    ([[0, 1, 15, 2]], [[0.5]], [[1.0]])
    """
    groups = split_groups(w, group_size, name).float()  # [out, in / g, g]
    minimums = to_half(groups.amin(-1), name)
    scales = (groups.amax(-1) - groups.amin(-1)) / 15
    codes, halves = round_to_scales(groups - minimums.float().unsqueeze(-1), scales, 0, 15, name)
    return codes, halves, minimums
