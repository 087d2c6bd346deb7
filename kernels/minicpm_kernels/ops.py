"""RMSNorm in one pass over memory, alone and fused with the residual add that stands before it.

The problem: y = x / sqrt(mean(x^2) + eps) * weight does about 4 FLOPs an element and moves 2 elements, so it is bound
by bytes on any machine. Written as torch operations it moves the tensor five to ten times: square, mean, rsqrt, two
products, casts.
The idea: a row is short (C of 64 to 16384) and fits in the registers of one program. Load it once, reduce it there,
scale it, store it once: 2 * C * bytes a row, which is the floor.

One program takes a tile [ROWS, BLOCK]: BLOCK is C padded to a power of two (Triton's tile sides are powers of two;
the mask keeps the padding out of the sum), and ROWS is more than one for narrow rows so that a program has enough
loads in flight.
Sums are in float32 whatever the inputs: the squares of a float16 row overflow at 65504. The result is rounded once,
from float32; the reference rounds before and after the product with the weight.

Left out: rows wider than 16384 numbers (they would need a second pass over the row), and the
gradient.
Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467, equation 4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minicpm_kernels.checks import require_runnable, require_tensor
from minicpm_kernels.registry import CompileConfig

WIDEST = 16384
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _rms_norm(x_ptr, weight_ptr, out_ptr, rows, C, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (col < C)
    at = row.to(tl.int64) * C + col  # a hidden state may hold more than 2^31 elements
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + col, mask=col < C, other=0.0).to(tl.float32)
    mean_square = tl.sum(x * x, axis=1, keep_dims=True) / C
    normed = x * tl.rsqrt(mean_square + eps) * weight
    tl.store(out_ptr + at, normed.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_rms_norm(
    residual_ptr,
    branch_ptr,
    weight_ptr,
    hidden_ptr,
    out_ptr,
    rows,
    C,
    eps,
    scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (col < C)
    at = row.to(tl.int64) * C + col
    residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + col, mask=col < C, other=0.0).to(tl.float32)
    hidden = residual + scale * branch
    tl.store(hidden_ptr + at, hidden.to(hidden_ptr.dtype.element_ty), mask=inside)
    mean_square = tl.sum(hidden * hidden, axis=1, keep_dims=True) / C
    normed = hidden * tl.rsqrt(mean_square + eps) * weight
    tl.store(out_ptr + at, normed.to(out_ptr.dtype.element_ty), mask=inside)


def _tile(width: int) -> tuple[int, int, int]:
    """(ROWS, BLOCK, num_warps) for rows of `width` numbers: about 2048 numbers a program, at most 32 a thread."""
    block = triton.next_power_of_2(width)
    rows = max(1, min(32, 2048 // block))
    return rows, block, max(4, min(16, block // 512))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; twin of `minicpm_ref.model.rms_norm`.

    x [..., C] and weight [C], contiguous, of one dtype (float32, float16, bfloat16), on one GPU; C at most 16384.
    Returns [..., C] in that dtype. Raises ValueError on anything else (bfloat16 in the interpreter included),
    RuntimeError when a gradient would be needed.
    """
    _validate("rms_norm", "x", x, weight)
    out = torch.empty_like(x)
    C = x.shape[-1]
    count = x.numel() // C
    rows, block, warps = _tile(C)
    _rms_norm[(triton.cdiv(count, rows),)](x, weight, out, count, C, eps, ROWS=rows, BLOCK=block, num_warps=warps)
    return out


def add_rms_norm(
    residual: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden = residual + scale * branch and its RMSNorm; twin of `minicpm_ref.ops.add_rms_norm`.

    residual and branch [..., C], weight [C], as in `rms_norm`. Returns (hidden, normed), both [..., C]. Raises as
    `rms_norm` does.
    """
    _validate("add_rms_norm", "residual", residual, weight)
    require_tensor("add_rms_norm", "branch", branch, residual.shape, (residual.dtype,), residual.device)
    require_runnable("add_rms_norm", branch)
    hidden, out = torch.empty_like(residual), torch.empty_like(residual)
    C = residual.shape[-1]
    count = residual.numel() // C
    rows, block, warps = _tile(C)
    _add_rms_norm[(triton.cdiv(count, rows),)](
        residual, branch, weight, hidden, out, count, C, eps, scale, ROWS=rows, BLOCK=block, num_warps=warps
    )
    return hidden, out


def _validate(function: str, name: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    require_tensor(function, name, x, dtypes=DTYPES)
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"{function}: {name} has shape {list(x.shape)}, expected [..., C] with at least one number")
    if x.shape[-1] > WIDEST:
        raise ValueError(
            f"{function}: {name} has rows of {x.shape[-1]} numbers, expected at most {WIDEST}: one program holds a row"
        )
    require_tensor(function, "weight", weight, x.shape[-1:], (x.dtype,), x.device)
    require_runnable(function, x, weight)


def _configs() -> tuple[CompileConfig, ...]:
    """bf16 at the widths of MiniCPM4-0.5B and 8B, a ragged, a narrow and the widest one; the other dtypes once."""
    configs = []
    widths = (
        (64, "bf16"),
        (1000, "bf16"),
        (1024, "bf16"),
        (4096, "bf16"),
        (WIDEST, "bf16"),
        (4096, "fp16"),
        (WIDEST, "fp32"),
    )
    for width, dtype in widths:
        rows, block, warps = _tile(width)
        constexprs = {"ROWS": rows, "BLOCK": block}
        pointer, numbers = f"*{dtype}", {"rows": "i32", "C": "i32", "eps": "fp32"}
        norm = dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), pointer) | numbers
        add = dict.fromkeys(("residual_ptr", "branch_ptr", "weight_ptr", "hidden_ptr", "out_ptr"), pointer)
        add |= numbers | {"scale": "fp32"}
        aligned = ("C",) if width % 16 == 0 else ()
        label = f"C{width}-{dtype}"
        configs.append(CompileConfig("rms_norm", "_rms_norm", label, norm, constexprs, aligned, warps))
        configs.append(CompileConfig("add_rms_norm", "_add_rms_norm", label, add, constexprs, aligned, warps))
    return tuple(configs)


COMPILE_CONFIGS = _configs()
