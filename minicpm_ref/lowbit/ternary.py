"""BitCPM: weights in {-1, 0, 1} with one scale for 128 of them, trained to live there.

The problem: a decoder that produces one token reads every weight once, so on a given memory its speed is bytes
divided by bandwidth. From 16 bits to 2 is 7.5 times fewer bytes, and it also turns the products into additions.
Rounding a trained model that far destroys it.

The idea: let training see the rounding. A weight matrix W [out, in] is cut along its rows into groups of g = 128:

    s  = mean(|W_group|)                          one scale a group, a statistic of the weights and not a parameter
    Wq = clamp(round(W_group / s), -1, 1) * s

The forward pass multiplies by Wq, the backward pass pretends that Wq = W (the straight-through estimator), and the
optimiser moves W, which stays in float32. Every linear inside the decoder layers is ternary; embeddings, norms and
the output matrix are not. Activations stay in floating point: the reports found quantizing them not worth it.

Why the scale is rounded to float16 *inside* the quantizer: files and kernels hold float16 scales. With the rounding
in `fake_quantize`, training, `quantize` and the packed product use the same codes and the same scales, bit for bit,
as long as W is float32; what is left between a QAT forward and packed inference is the order of a float32 sum.

Why the mean: `GRIDS` holds the rivals that the BitCPM report compares from one starting point. Those scaled by the
largest weight leave most weights on the levels next to zero; those without a zero, or asymmetric, learn more slowly.

On a CPU the fast product also rounds activations to int8, a scale for 128 of them (`ternary_matmul_int8`): integer
dot products are exact and four times as wide. That costs 0.6 % of relative error in the outputs on Gaussian data.

Left out: learned scales, which the reports found no better; bias terms, which MiniCPM has none of.
Sources: MiniCPM4 technical report (arXiv 2506.07900) section 3.3; BitCPM-CANN report sections 3.1 to 3.3; Bengio et
al., arXiv 1308.3432, for the estimator; Ma et al., "The era of 1-bit LLMs", arXiv 2402.17764, for the mean-based
scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor

from minicpm_ref.lowbit.packing import LANES, from_lanes, scales_from_lanes

SMALLEST_SCALE = 2.0**-24  # the smallest positive float16: a group of zeros gets a scale that is finite and not zero
SMALLEST_ABSMAX = 1e-30  # activations below this are zero; 127 divided by less would overflow float32


@dataclass(frozen=True)
class Grid:
    """A quantization grid: its levels, in units of the scale; the scale of groups [..., g] -> [...]; the nearest
    level.
    """

    levels: tuple[float, ...]
    scale: Callable[[Tensor], Tensor]
    nearest: Callable[[Tensor], Tensor]


def _absmax(groups: Tensor) -> Tensor:
    return groups.abs().amax(-1)


# Ternary and its rivals in the ablation of the BitCPM-CANN report, section 3.1. `round` is half to even.
GRIDS = {
    "ternary": Grid((-1, 0, 1), lambda groups: groups.abs().mean(-1), lambda v: v.round().clamp(-1, 1)),
    "asymmetric4": Grid((-2, -1, 0, 1), lambda groups: _absmax(groups) / 1.5, lambda v: v.round().clamp(-2, 1)),
    "half4": Grid(
        (-1.5, -0.5, 0.5, 1.5),
        lambda groups: _absmax(groups) / 1.5,
        lambda v: ((v - 0.5).round() + 0.5).clamp(-1.5, 1.5),
    ),
    "nonzero4": Grid(
        (-2, -1, 1, 2), lambda groups: _absmax(groups) / 2, lambda v: v.abs().round().clamp(1, 2).copysign(v)
    ),
    "five": Grid((-2, -1, 0, 1, 2), lambda groups: _absmax(groups) / 2, lambda v: v.round().clamp(-2, 2)),
}


def find_grid(grid: str) -> Grid:
    """The entry of `GRIDS`; raises ValueError for a name that is not there."""
    if grid not in GRIDS:
        raise ValueError(f"grid {grid!r}: expected one of {', '.join(GRIDS)}")
    return GRIDS[grid]


def split_groups(w: Tensor, group_size: int, name: str = "weight") -> Tensor:
    """w [out, in] as [out, in / g, g]: groups lie inside a row.

    `w.view(-1, g)` would do the same where g divides `in`, and quietly join the end of a row to the start of the next
    where it does not. Raises ValueError, naming the tensor, in that case.
    """
    if w.ndim != 2 or group_size < 1 or w.shape[1] % group_size:
        raise ValueError(
            f"{name}: shape {list(w.shape)}, expected [out, in] with `in` a multiple of group_size {group_size}"
        )
    return rearrange(w, "out (group k) -> out group k", k=group_size)


def quantize(w: Tensor, group_size: int = 128, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Ternary codes (int8 [out, in] in {-1, 0, 1}) and scales (float16 [out, in / group_size]) of w [out, in].

    Raises ValueError, naming the tensor `name`, when `in` is not a multiple of `group_size`, for NaN or infinite
    weights, and for a scale beyond float16. Source: MiniCPM4 technical report section 3.3.
    """
    _require_finite(w, name)
    levels, scales = _project(w, group_size, "ternary", name)
    _require_finite(scales, f"scale of {name}")
    return levels.flatten(1).to(torch.int8), scales


def dequantize(codes: Tensor, scales: Tensor, group_size: int = 128) -> Tensor:
    """codes * scale, float32 [out, in] (float64 for float64 scales); the inverse of `quantize` up to its rounding."""
    dtype = torch.promote_types(scales.dtype, torch.float32)
    groups = split_groups(codes, group_size, "codes").to(dtype)  # [out, in / g, g]
    return (groups * scales.to(dtype).unsqueeze(-1)).flatten(1)


def fake_quantize(w: Tensor, group_size: int = 128, grid: str = "ternary") -> Tensor:
    """w [out, in] rounded to a grid of `GRIDS`, in w's dtype; the gradient passes as if nothing had happened.

    For float32 w and the ternary grid it equals `dequantize(*quantize(w))` exactly. Nothing is checked for NaN or
    infinity, which would stall a GPU at every step: they spread over their group and into the loss. Raises ValueError
    for an unknown grid or an `in` that is not a multiple of `group_size`.
    """
    return cast(Tensor, _StraightThrough.apply(w, group_size, grid))


def recover_ternary(weight: Tensor, group_size: int = 128, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Codes and scales, as `quantize` returns them, of a weight whose every group holds only -s, 0 and s.

    That is how BitCPM4 is published: fake-quantized, in ordinary 16-bit tensors. Nothing is rounded: `dequantize`
    gives the same numbers back. (`quantize` would not: the mean of |W| is s times the fraction that is not zero.)
    Raises ValueError, naming the tensor and the group, where a group is not ternary or its s is not a float16.
    """
    _require_finite(weight, name)
    groups = split_groups(weight, group_size, name).to(torch.promote_types(weight.dtype, torch.float32))
    scales = _absmax(groups)  # [out, in / g]
    codes = groups.sign()
    _refuse_group((codes * scales.unsqueeze(-1) != groups).any(-1), groups, name, "is not ternary")
    halves = scales.half()
    _refuse_group(halves.to(scales.dtype) != scales, groups, name, "has a scale that is not a float16")
    return codes.flatten(1).to(torch.int8), halves.clamp(min=SMALLEST_SCALE)


def quantize_activations(x: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor]:
    """x [..., in] as int8 [..., in / g, g] and float32 scales [..., in / g]: x is about q * scale, scale = absmax /
    127.

    Rounded half to even, in float32. A group that holds NaN or infinity gets q = 0 and a NaN scale, so that it
    poisons the outputs of its own token and nothing else.
    """
    groups = rearrange(x.float(), "... (group k) -> ... group k", k=group_size)
    absmax = _absmax(groups)  # [..., in / g]
    usable = absmax.isfinite() & (absmax > SMALLEST_ABSMAX)
    inverse = torch.where(usable, 127 / absmax, 0.0)
    q = torch.where(usable.unsqueeze(-1), groups * inverse.unsqueeze(-1), 0.0).round()
    return q.to(torch.int8), torch.where(absmax.isfinite(), absmax / 127, torch.nan)


def ternary_matmul(x: Tensor, codes: Tensor, scales: Tensor, group_size: int = 128) -> Tensor:
    """x [..., in] times the transpose of a packed ternary matrix: y [..., out] in x's dtype, y = x @
    dequantize(...).T.

    codes uint8 [out / 16, in / 16, 16, 4] and scales float16 [out / 16, in / g, 16] are in the rows-in-lanes layout
    of `ternary_packing` (`to_lanes`, `scales_to_lanes`). Computed in float32 (float64 for float64 x). Raises
    ValueError for shapes that do not belong together or a code byte out of range.
    """
    w, s = _unpack_lanes(x, codes, scales, group_size)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype) @ dequantize(w, s.to(dtype), group_size).T).to(x.dtype)


def ternary_matmul_int8(x: Tensor, codes: Tensor, scales: Tensor, group_size: int = 128) -> Tensor:
    """`ternary_matmul` with activations rounded to int8 by `quantize_activations`; same arguments, same errors.

    All in float32 and without fused multiply-add, y starts at 0 and takes, group after group, dot * (scale of x *
    scale of w), where dot is an exact integer. This fixes every bit of the result, and kernels return the same bits.
    """
    w, s = _unpack_lanes(x, codes, scales, group_size)
    q, q_scales = quantize_activations(x, group_size)
    y = torch.zeros(*x.shape[:-1], w.shape[0], dtype=torch.float32, device=x.device)  # [..., out]
    for group, w_group in enumerate(w.float().split(group_size, dim=1)):
        dot = q[..., group, :].float() @ w_group.T  # exact: every partial sum is an integer below 2^24
        y = y + dot * (q_scales[..., group, None] * s[:, group].float())
    return y.to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    """Forward `_project`, backward the identity. Unlike w + (wq - w).detach(), the result is wq to the last bit."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, group_size: int, grid: str) -> Tensor:
        levels, scales = _project(w, group_size, grid, "weight")
        return (levels * scales.to(levels.dtype).unsqueeze(-1)).flatten(1).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def _project(w: Tensor, group_size: int, grid: str, name: str) -> tuple[Tensor, Tensor]:
    """(levels [out, in / g, g] in float32 or wider, scales float16 [out, in / g])."""
    rule = find_grid(grid)
    groups = split_groups(w, group_size, name).to(torch.promote_types(w.dtype, torch.float32))
    scales = rule.scale(groups).clamp(min=SMALLEST_SCALE).half()
    return rule.nearest(groups / scales.to(groups.dtype).unsqueeze(-1)), scales


def _unpack_lanes(x: Tensor, codes: Tensor, scales: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes [out, in] and scales [out, in / g], after checking that they belong to x and to each other."""
    w = from_lanes(codes)
    columns = w.shape[1]
    if x.shape[-1] != columns:
        raise ValueError(f"x has {x.shape[-1]} columns, expected {columns} like the codes {list(codes.shape)}")
    expected = (codes.shape[0], columns // group_size, LANES)
    if columns % group_size or scales.shape != expected:
        raise ValueError(
            f"scales {list(scales.shape)}, expected {list(expected)} for {columns} columns in groups of {group_size}"
        )
    return w, scales_from_lanes(scales)


def _require_finite(values: Tensor, name: str) -> None:
    wrong = ~values.isfinite()
    if bool(wrong.any()):
        raise ValueError(f"{name}: {float(values[wrong][0])} at {wrong.nonzero()[0].tolist()}, expected finite numbers")


def _refuse_group(wrong: Tensor, groups: Tensor, name: str, why: str) -> None:
    """Raise for the first group that is wrong, [out, in / g], with what it holds."""
    if bool(wrong.any()):
        row, group = wrong.nonzero()[0].tolist()
        magnitudes = groups[row, group].abs().unique()
        listed = ", ".join(f"{float(m):.9g}" for m in magnitudes[:4]) + (", ..." if len(magnitudes) > 4 else "")
        raise ValueError(
            f"{name}: group {group} of row {row} {why} at group_size {groups.shape[-1]}: |w| takes {listed}"
        )
