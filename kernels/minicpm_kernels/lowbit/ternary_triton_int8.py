"""Ternary matrix times vector and matrix on a GPU with activations rounded to int8: fewer instructions for the same
bytes.

The problem: `ternary_triton` keeps activations in floating point, and at one token it spends 2.1 lane instructions a
weight where reading a weight leaves time for 1.7. The idea: activations in int8, a scale for 128 of them. Four of
them meet four codes in one instruction (dp4a), the codes of a word need one AND for four, and tensor cores multiply
int8 at twice the rate of bfloat16. Compiled for sm_90, the loop of `_matvec` takes 0.9 instructions a weight at one
token, 1.3 at two, and 2.9 at four; `_matmul` 2.5 for up to sixteen. What it costs is 0.6 % of relative error in the
outputs on Gaussian data, so a model has to ask for it: TernaryLinear(activations="int8").

How the layout fits: in the rows-in-lanes layout bit pair i of byte c of a word is column 4 i + c of its sixteen, so
`word >> 2 i & 0x03030303` holds the codes of four neighbouring columns. `_quantize` stores each group of activations
by bit pair, 32 bytes each, which is one operand of tl.dot. The offset of the codes, u = weight + 1, is the sum of the
activations of a group, an integer subtracted once a group.

How exact it is: the integer of a group is exact, and its two scales are multiplied first, as in the reference; the
steps that round are kept apart (FP_FUSION = False). `_matmul` without splits returns the reference's bits. Elsewhere
groups are added in another order, always the same one.

Left out: repacking for dp4a on AMD, where bytes are unpacked by shifts; integer scratch matrices for prompts.
Source: PTX ISA, `dp4a`. The reference is `minicpm_ref.lowbit.ternary.ternary_matmul_int8`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minicpm_kernels.checks import on_nvidia
from minicpm_kernels.lowbit.ternary_triton import GROUP, ROWS, _add_up, _matmul_tile, _partial, _shares, _validate
from minicpm_kernels.registry import NVIDIA, TARGETS, CompileConfig

# Not measured yet: kernels/bench/ternary_matmul_gpu.py times both sides. `_matvec` takes up to four tokens; until then
# the limit rests on the counts above.
MATVEC_TOKENS = 2
GROUPS = 32  # of one step of `_matvec`: 16 KiB of weights
FP_FUSION = False  # a fused multiply-add would skip a rounding that the reference does
DOT4 = tl.constexpr("dp4a.u32.s32 $0, $1, $2, $3;")


@triton.jit
def _quantize(x_ptr, q_ptr, scales_ptr, sums_ptr, tokens, padded, groups):
    """Round the activations of one token and group; padding tokens become zeros.

    q [padded, groups, 4, 8, 4]: bit pair, chunk of sixteen columns, byte; scales and sums (of q) [groups, padded].
    """
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, 128)
    x = tl.load(x_ptr + (token * groups + group) * 128 + column, mask=token < tokens, other=0.0).to(tl.float32)
    # Among non-negative floats the larger number has the larger bits, and NaN stands above infinity.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    finite = largest < 0x7F800000
    absmax = largest.to(tl.float32, bitcast=True)
    usable = finite & (absmax > 1e-30)
    limit = tl.full((), 127.0, tl.float32)
    scaled = tl.where(usable, x * tl.div_rn(limit, tl.where(usable, absmax, 1.0)), 0.0)
    q = (scaled + 12582912.0) - 12582912.0  # 3 * 2^22, whose neighbours are integers: rounds half to even
    at = column % 16 // 4 * 32 + column // 16 * 4 + column % 4
    tl.store(q_ptr + (token * groups + group) * 128 + at, q.to(tl.int8))
    scale = tl.where(finite, tl.div_rn(absmax, limit), float("nan"))
    tl.store(scales_ptr + group * padded + token, scale)
    tl.store(sums_ptr + group * padded + token, tl.sum(q.to(tl.int32), axis=0))


@triton.jit
def _dot4(digits, x, acc, ASSEMBLY: tl.constexpr):
    """acc + the four bytes of `digits`, 0 to 255, times the four signed bytes of x."""
    if ASSEMBLY:
        acc = tl.inline_asm_elementwise(DOT4, "=r,r,r,r", [digits, x, acc], tl.int32, is_pure=True, pack=1)
    else:
        acc = acc + (digits & 0xFF) * (x << 24 >> 24)
        acc += (digits >> 8 & 0xFF) * (x << 16 >> 24)
        acc += (digits >> 16 & 0xFF) * (x << 8 >> 24)
        acc += (digits >> 24 & 0xFF) * (x >> 24)
    return acc


@triton.jit
def _matvec(
    words_ptr, scales_ptr, q_ptr, q_scales_ptr, sums_ptr, out_ptr, rows, groups, share,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens, padded to WIDTH, times sixteen rows, over `share` groups; out [splits, TOKENS, rows]."""
    block, split = tl.program_id(0), tl.program_id(1)
    token, row = tl.arange(0, WIDTH)[:, None, None], tl.arange(0, 16)[None, None, :]
    acc = tl.zeros((WIDTH, GROUPS, 16), tl.float32)
    end = tl.minimum(split * share + share, groups)
    for start in range(split * share, end, GROUPS):
        group = (start + tl.arange(0, GROUPS))[None, :, None]
        inside = group < end
        present = inside & (token < TOKENS)
        x = q_ptr + (token * groups + group) * 32
        once = tl.zeros((WIDTH, GROUPS, 16), tl.int32)
        fourfold = once  # bit pairs 1 and 3 are not shifted down: their products are four times too large
        for chunk in tl.static_range(8):
            at = (block * groups + group) * 128 + chunk * 16 + row
            words = tl.load(words_ptr + at, mask=inside, other=0, eviction_policy="evict_first")
            high = words >> 4
            once = _dot4(words & 0x03030303, tl.load(x + chunk, mask=present, other=0), once, ASSEMBLY)
            fourfold = _dot4(words & 0x0C0C0C0C, tl.load(x + 8 + chunk, mask=present, other=0), fourfold, ASSEMBLY)
            once = _dot4(high & 0x03030303, tl.load(x + 16 + chunk, mask=present, other=0), once, ASSEMBLY)
            fourfold = _dot4(high & 0x0C0C0C0C, tl.load(x + 24 + chunk, mask=present, other=0), fourfold, ASSEMBLY)
        at = group * TOKENS + token
        dot = once + (fourfold >> 2) - tl.load(sums_ptr + at, mask=present, other=0)
        x_scale = tl.load(q_scales_ptr + at, mask=present, other=0.0)
        scales = tl.load(scales_ptr + (block * groups + group) * 16 + row, mask=inside, other=0.0)
        acc += dot.to(tl.float32) * (x_scale * scales.to(tl.float32))
    token, row = tl.arange(0, WIDTH)[:, None], tl.arange(0, 16)[None, :]
    out = out_ptr + (split * TOKENS + token) * rows + block * 16 + row
    tl.store(out, tl.sum(acc, axis=1).to(out_ptr.dtype.element_ty), mask=token < TOKENS)


@triton.jit
def _matmul(
    words_ptr, scales_ptr, q_ptr, q_scales_ptr, sums_ptr, out_ptr, tokens, padded, rows, groups, share,
    TOKENS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens times TILE rows, over `share` groups; one tl.dot a bit pair; out [splits, tokens, rows].

    The operand of a bit pair, [TILE, 32], is the masked words read as bytes: in the binary, one AND for four
    numbers.
    """
    tile, split = tl.program_id(0), tl.program_id(2)
    block = tile * (TILE // 16) + tl.arange(0, TILE // 16)
    row = tile * TILE + tl.arange(0, TILE)
    first = tl.program_id(1).to(tl.int64) * TOKENS
    token = tl.arange(0, TOKENS)
    word = block[:, None, None] * groups * 128 + tl.arange(0, 8)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    scale = row // 16 * groups * 16 + row % 16
    x_ptr = q_ptr + first * groups * 128 + token[None, :] * groups * 128 + tl.arange(0, 32)[:, None]
    acc = tl.zeros((TILE, TOKENS), tl.float32)
    for group in range(split * share, tl.minimum(split * share + share, groups)):
        words = tl.load(words_ptr + word + group * 128, mask=(block * 16 < rows)[:, None, None], other=0)
        words = tl.trans(words, 0, 2, 1).reshape(TILE, 8)
        dots = tl.zeros((TILE, TOKENS), tl.int32)
        for pair in tl.static_range(4):
            digits = words >> 2 * pair & 0x03030303
            even = tl.join(digits.to(tl.int8), (digits >> 16).to(tl.int8))
            odd = tl.join((digits >> 8).to(tl.int8), (digits >> 24).to(tl.int8))
            weights = tl.join(even, odd).reshape(TILE, 32)
            dots = tl.dot(weights, tl.load(x_ptr + group * 128 + pair * 32), dots, out_dtype=tl.int32)
        dots -= tl.load(sums_ptr + group * padded + first + token)[None, :]
        x_scale = tl.load(q_scales_ptr + group * padded + first + token)
        scales = tl.load(scales_ptr + scale + group * 16, mask=row < rows, other=0.0).to(tl.float32)
        acc += dots.to(tl.float32) * (x_scale[None, :] * scales[:, None])
    out = out_ptr + (split * tokens + first + token)[None, :] * rows + row[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(first + token < tokens)[None, :] & (row < rows)[:, None])


def ternary_matmul_int8(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_size: int = 128
) -> torch.Tensor:
    """x [..., in], rounded to int8, times the transpose of a packed ternary matrix; twin of
    `minicpm_ref.lowbit.ternary.ternary_matmul_int8`.

    x float32, float16 or bfloat16; codes uint8 [out / 16, in / 16, 16, 4] and scales float16 [out / 16, in / 128, 16]
    in the rows-in-lanes layout; contiguous, on one GPU. Code bytes are not checked: a pair of bits that is 3 counts as
    weight 2. Returns [..., out] in x's dtype, the same bits on every run, the reference's up to the order of a
    float32 sum. A token that holds NaN or infinity gets NaN in all its outputs.

    Raises ValueError for anything else (other group sizes, bfloat16 in the interpreter), RuntimeError when a gradient
    would be needed. Source: MiniCPM4 technical report (arXiv 2506.07900) section 3.3 for the weights.
    """
    _validate("ternary_matmul_int8", x, codes, scales, group_size)
    flat = x.reshape(-1, x.shape[-1])  # [tokens, in]
    words = codes.view(torch.int32).squeeze(-1)  # [out / 16, in / 16, 16]
    y = (_run_matvec if len(flat) <= MATVEC_TOKENS else _run_matmul)(flat, words, scales)
    return y.view(*x.shape[:-1], words.shape[0] * ROWS)


def _run_matvec(x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """One to four tokens x [tokens, in] -> [tokens, out]."""
    tokens, (blocks, chunks, _) = len(x), words.shape
    q, q_scales, sums = _prepare(x, tokens)
    groups = chunks // 8
    width, tile, warps = _matvec_tile(tokens, groups)
    splits, share = _shares(blocks, triton.cdiv(groups, tile))
    out = _partial(x, splits, blocks * ROWS)
    _matvec[(blocks, splits)](
        words, scales, q.view(torch.int32), q_scales, sums, out, blocks * ROWS, groups, share * tile,
        TOKENS=tokens, WIDTH=width, GROUPS=tile, ASSEMBLY=on_nvidia(), num_warps=warps, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return _add_up(out, x.dtype)


def _run_matmul(x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x [tokens, in] -> [tokens, out], by tl.dot."""
    tokens, (blocks, chunks, _) = len(x), words.shape
    tile, width, warps = _matmul_tile(tokens, torch.bfloat16)
    padded = triton.cdiv(tokens, width) * width
    q, q_scales, sums = _prepare(x, padded)
    tiles, groups = triton.cdiv(blocks * ROWS, tile), chunks // 8
    splits, share = _shares(tiles * (padded // width), groups)
    out = _partial(x, splits, blocks * ROWS)
    _matmul[(tiles, padded // width, splits)](
        words, scales, q, q_scales, sums, out, tokens, padded, blocks * ROWS, groups, share,
        TOKENS=width, TILE=tile, num_warps=warps, num_stages=3, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return _add_up(out, x.dtype)


def _prepare(x: torch.Tensor, padded: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [tokens, in] as int8 [padded, in], sorted by bit pair, and its scales and sums [in / 128, padded]."""
    tokens, columns = x.shape
    groups = columns // GROUP
    q = torch.empty(padded, columns, dtype=torch.int8, device=x.device)
    scales = torch.empty(groups, padded, dtype=torch.float32, device=x.device)
    sums = torch.empty(groups, padded, dtype=torch.int32, device=x.device)
    _quantize[(padded, groups)](
        x, q, scales, sums, tokens, padded, groups, num_warps=1, enable_fp_fusion=FP_FUSION
    )  # fmt: skip
    return q, scales, sums


def _matvec_tile(tokens: int, groups: int) -> tuple[int, int, int]:
    """(tokens, groups, num_warps) of a tile of `_matvec`.

    With more threads than tokens times groups Triton lets every thread load the activations that it needs; otherwise
    they go through shared memory, with a barrier each.
    """
    width = triton.next_power_of_2(tokens)
    return width, min(GROUPS, triton.next_power_of_2(groups)), 4 if width <= 2 else 8


def _configs() -> tuple[CompileConfig, ...]:
    """Every kernel as it is launched for matrices of thousands of rows; dp4a on NVIDIA targets only."""
    name, shared = "ternary_matmul_int8", {"scales_ptr": "*fp32", "sums_ptr": "*i32"}
    configs = []
    for x in ("bf16", "fp32"):
        signature = shared | {"x_ptr": f"*{x}", "q_ptr": "*i8"} | dict.fromkeys(("tokens", "padded", "groups"), "i32")
        configs.append(CompileConfig(name, "_quantize", x, signature, {}, (), 1, fp_fusion=FP_FUSION))
    shared = {"words_ptr": "*i32", "scales_ptr": "*fp16", "q_scales_ptr": "*fp32", "sums_ptr": "*i32"}
    shared |= {"out_ptr": "*bf16"}
    for tokens, assembly in ((1, True), (2, True), (4, True), (1, False), (4, False)):
        signature = shared | {"q_ptr": "*i32"} | dict.fromkeys(("rows", "groups", "share"), "i32")
        width, tile, warps = _matvec_tile(tokens, 128)
        constexprs = {"TOKENS": tokens, "WIDTH": width, "GROUPS": tile, "ASSEMBLY": assembly}
        configs.append(
            CompileConfig(
                name, "_matvec", f"M{tokens}-{'assembly' if assembly else 'shifts'}", signature, constexprs,
                ("rows", "groups", "share"), warps, targets=NVIDIA if assembly else TARGETS, fp_fusion=FP_FUSION,
            )  # fmt: skip
        )
    for tokens in (16, 32, 64):
        tile, width, warps = _matmul_tile(tokens, torch.bfloat16)
        signature = shared | {"q_ptr": "*i8"}
        signature |= dict.fromkeys(("tokens", "padded", "rows", "groups", "share"), "i32")
        configs.append(
            CompileConfig(
                name, "_matmul", f"M{width}", signature, {"TOKENS": width, "TILE": tile}, ("padded", "rows", "groups"),
                warps, 3, fp_fusion=FP_FUSION,
            )  # fmt: skip
        )
    return tuple(configs)


COMPILE_CONFIGS = _configs()
