"""Ternary matrix times vector and matrix on a GPU: 2.125 bits a weight, read once.

The problem: at few tokens the product is bound by the bytes of the weights, so two-bit weights could be 7.5 times
faster than 16-bit ones. What stands in the way is arithmetic: between two words from memory a GPU has time for
1.7 instructions a weight.

The ideas:
- *One layout.* The kernels read the rows-in-lanes layout of the reference as it is. As int32 it is [out / 16, in /
  16, 16]: one word holds 16 consecutive columns of one row, sixteen rows side by side are 64 contiguous bytes, and a
  block of sixteen rows is one stream of memory.
- *Codes that are floats already.* Bit pair i of a 16-bit half, masked in place and read as float16, is the subnormal
  number u * 4^i * 2^-24 with u = weight + 1: no conversion at all (see `_ternary_triton_asm`; tensor cores take
  subnormal operands, too). Pairs 5 to 7 come down by one shift.
- *Activations adapt instead.* `_planes` scales each group of 128 to float16 range by a power of two, multiplies by
  4^-i, and sorts by bit pair, so that the product kernels make contiguous loads only. The offset u - 1 is the
  sum of the activations of a group, in float32, subtracted once a group.
- *Scales outside.* Group scales multiply float32 sums, so weights enter as exact integers.

Which kernel runs: one or two tokens `_matvec` (not float32, nor float16 on NVIDIA), more `_matmul` on tensor cores
(float32 without them); from SCRATCH_TOKENS on the matrix is written out once (`_dequantize`) and torch multiplies.
Where rows make few programs, `in` is split over more; a second kernel adds the partial sums in a fixed order, so that
a result does not depend on which program finished first.

On AMD and in the interpreter the codes are converted to floats by ordinary operations instead (SUBNORMAL = False),
with the same planes and the same float32 sums.

Left out: base-3 weights (decoding costs more than the bytes it saves); group sizes other than 128; skipping
zeros (a third of the weights, but an index is larger than two bits); the gradient. Activations in int8 have kernels of
their own, `ternary_triton_int8`.
Source of the storage: MiniCPM4 technical report (arXiv 2506.07900) section 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from minicpm_kernels.checks import on_nvidia, require_runnable, require_tensor
from minicpm_kernels.lowbit._ternary_triton_asm import CONSTRAINTS, WORD_PRODUCTS
from minicpm_kernels.registry import NVIDIA, TARGETS, CompileConfig

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GROUP = 128  # columns that share a scale
ROWS = 16  # rows that stand side by side, and columns in a word

# Not measured yet: kernels/bench/ternary_matmul_gpu.py times both sides of both limits. What they rest on until then:
# lane instructions a weight in the loops compiled for sm_90, which are 2.1, 3.1 and 5.2 for one, two and four tokens in
# `_matvec`, and 2.6 for up to sixteen in `_matmul`, which however needs more splits.
MATVEC_TOKENS = 2
SCRATCH_TOKENS = 256  # arithmetic then takes about as long as writing the dense matrix and reading it back
ENOUGH_PROGRAMS = 256  # about two for each multiprocessor of the GPUs that this is for


@triton.jit
def _planes(x_ptr, planes_ptr, factors_ptr, sums_ptr, tokens, padded, groups, SUBNORMAL: tl.constexpr):
    """Sort, scale and sum the activations of one group and token; padding tokens become zeros.

    planes [padded, 8, in / 16, 2]: bit pair i = 4 b + p, chunk j and half h hold x[16 j + 4 p + 2 h + b] * 2^13 *
    4^-(i mod 5) / 2^e; factors [groups, padded] undo the powers of two; sums [groups, padded].
    """
    group, token = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, 128)
    x = tl.load(x_ptr + (token * groups + group) * 128 + column, mask=token < tokens, other=0.0)
    x = x.to(tl.float32)
    pair = column % 2 * 4 + column % 16 // 4
    direct = tl.where(pair < 5, pair, pair - 5)
    damped = ((127 - 2 * direct) << 23).to(tl.float32, bitcast=True)  # 4^-direct
    # 2^e <= max |x| < 2^(e + 1). The limits keep every power of two a normal float32: a float16 plane of a group beyond
    # 2^117 overflows, to NaN in the end; a group below 2^-113 is scaled less and keeps all of its bits even so.
    largest = tl.max(tl.abs(x), axis=0).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(largest, 14), 243)
    up = ((254 - exponent) << 23).to(tl.float32, bitcast=True)  # 2^-e
    down = ((exponent + (11 if SUBNORMAL else -13)) << 23).to(tl.float32, bitcast=True)  # 2^(e - 13), times 2^24
    half = column % 4 // 2
    at = (token * 8 + pair) * groups * 16 + group * 16 + column // 16 * 2 + half
    tl.store(planes_ptr + at, (x * up * (8192 * damped)).to(planes_ptr.dtype.element_ty))
    tl.store(factors_ptr + group * padded + token, down)
    tl.store(sums_ptr + group * padded + token, tl.sum(x, axis=0))


@triton.jit
def _pair_product(total, words, plane, PAIR: tl.constexpr):
    """total + what bit pair PAIR of `words` contributes with its plane, by conversion to float32."""
    bits = (words if PAIR < 5 else words >> 10) & (0x00030003 << (2 * (PAIR % 5)))
    lower = plane.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    upper = (plane >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return total + (bits & 0xFFFF).to(tl.float32) * lower + (bits >> 16).to(tl.float32) * upper


@triton.jit
def _add_token(
    acc, words, scales, planes_ptr, factors_ptr, sums_ptr, token, chunk, inside, chunks, tokens, SUBNORMAL: tl.constexpr
):  # fmt: skip
    """acc [chunks, 16 rows] + the products of one token with the words of a tile."""
    plane = planes_ptr + token * 8 * chunks + chunk
    p0 = tl.load(plane, mask=inside, other=0)[:, None]
    p1 = tl.load(plane + chunks, mask=inside, other=0)[:, None]
    p2 = tl.load(plane + 2 * chunks, mask=inside, other=0)[:, None]
    p3 = tl.load(plane + 3 * chunks, mask=inside, other=0)[:, None]
    p4 = tl.load(plane + 4 * chunks, mask=inside, other=0)[:, None]
    p5 = tl.load(plane + 5 * chunks, mask=inside, other=0)[:, None]
    p6 = tl.load(plane + 6 * chunks, mask=inside, other=0)[:, None]
    p7 = tl.load(plane + 7 * chunks, mask=inside, other=0)[:, None]
    group = chunk // 8 * tokens + token
    factor = tl.load(factors_ptr + group, mask=inside, other=0.0)
    offset = tl.load(sums_ptr + group, mask=inside & (chunk % 8 == 0), other=0.0)  # once a group
    if SUBNORMAL:
        products = tl.inline_asm_elementwise(
            WORD_PRODUCTS, CONSTRAINTS, [words, p0, p1, p2, p3, p4, p5, p6, p7], tl.float32, is_pure=True, pack=1
        )
    else:
        products = _pair_product(words.to(tl.float32) * 0.0, words, p0, 0)
        products = _pair_product(products, words, p1, 1)
        products = _pair_product(products, words, p2, 2)
        products = _pair_product(products, words, p3, 3)
        products = _pair_product(products, words, p4, 4)
        products = _pair_product(products, words, p5, 5)
        products = _pair_product(products, words, p6, 6)
        products = _pair_product(products, words, p7, 7)
    return acc + (products * factor[:, None] - offset[:, None]) * scales


@triton.jit
def _matvec(
    words_ptr, scales_ptr, planes_ptr, factors_ptr, sums_ptr, out_ptr, rows, chunks, share,
    TOKENS: tl.constexpr, CHUNKS: tl.constexpr, SUBNORMAL: tl.constexpr,
):  # fmt: skip
    """One to four tokens times sixteen rows, over `share` chunks; out [splits, TOKENS, rows]."""
    block, split = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, 16)[None, :]
    acc0 = tl.zeros((CHUNKS, 16), tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    end = tl.minimum(split * share + share, chunks)
    for start in range(split * share, end, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        inside = chunk < end
        at = (block * chunks + chunk)[:, None] * 16 + row
        words = tl.load(words_ptr + at, mask=inside[:, None], other=0, eviction_policy="evict_first")
        at = (block * (chunks // 8) + chunk // 8)[:, None] * 16 + row
        scales = tl.load(scales_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
        acc0 = _add_token(
            acc0, words, scales, planes_ptr, factors_ptr, sums_ptr, 0, chunk, inside, chunks, TOKENS, SUBNORMAL
        )
        if TOKENS > 1:
            acc1 = _add_token(
                acc1, words, scales, planes_ptr, factors_ptr, sums_ptr, 1, chunk, inside, chunks, TOKENS, SUBNORMAL
            )
        if TOKENS > 2:
            acc2 = _add_token(
                acc2, words, scales, planes_ptr, factors_ptr, sums_ptr, 2, chunk, inside, chunks, TOKENS, SUBNORMAL
            )
        if TOKENS > 3:
            acc3 = _add_token(
                acc3, words, scales, planes_ptr, factors_ptr, sums_ptr, 3, chunk, inside, chunks, TOKENS, SUBNORMAL
            )
    out = out_ptr + split * TOKENS * rows + block * 16 + tl.arange(0, 16)
    dtype = out_ptr.dtype.element_ty
    tl.store(out, tl.sum(acc0, axis=0).to(dtype))
    if TOKENS > 1:
        tl.store(out + rows, tl.sum(acc1, axis=0).to(dtype))
    if TOKENS > 2:
        tl.store(out + 2 * rows, tl.sum(acc2, axis=0).to(dtype))
    if TOKENS > 3:
        tl.store(out + 3 * rows, tl.sum(acc3, axis=0).to(dtype))


@triton.jit
def _matmul(
    words_ptr, scales_ptr, planes_ptr, factors_ptr, sums_ptr, out_ptr, tokens, padded, rows, groups, share,
    TOKENS: tl.constexpr, TILE: tl.constexpr, SUBNORMAL: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens times TILE rows, over `share` groups; one tl.dot a bit pair; out [splits, tokens, rows].

    The operand of a bit pair, [TILE, 16], is made of the masked words alone: in the binary, of one AND for two
    numbers.
    """
    tile, split = tl.program_id(0), tl.program_id(2)
    block = tile * (TILE // 16) + tl.arange(0, TILE // 16)
    row = tile * TILE + tl.arange(0, TILE)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, 16)
    word = block[:, None, None] * groups * 128 + tl.arange(0, 8)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    scale = row // 16 * groups * 16 + row % 16
    plane = token[None, :] * 8 * groups * 16 + column[:, None]
    acc = tl.zeros((TILE, TOKENS), tl.float32)
    for group in range(split * share, tl.minimum(split * share + share, groups)):
        words = tl.load(words_ptr + word + group * 128, mask=(block * 16 < rows)[:, None, None], other=0)
        words = tl.trans(words, 0, 2, 1).reshape(TILE, 8)
        sums = tl.zeros((TILE, TOKENS), tl.float32)
        for pair in tl.static_range(8):
            bits = (words if pair < 5 else words >> 10) & (0x00030003 << (2 * (pair % 5)))
            halves = tl.join(bits.to(tl.int16), (bits >> 16).to(tl.int16)).reshape(TILE, 16)
            x = tl.load(planes_ptr + plane + (pair * groups + group) * 16)  # [16, TOKENS]
            weights = halves.to(tl.float16, bitcast=True) if SUBNORMAL else halves.to(x.dtype)
            sums = tl.dot(weights, x, sums, input_precision="ieee")
        factor = tl.load(factors_ptr + group * padded + token)
        offset = tl.load(sums_ptr + group * padded + token)
        scales = tl.load(scales_ptr + scale + group * 16, mask=row < rows, other=0.0).to(tl.float32)
        acc += scales[:, None] * (sums * factor[None, :] - offset[None, :])
    out = out_ptr + (split * tokens + token)[None, :] * rows + row[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(token < tokens)[None, :] & (row < rows)[:, None])


@triton.jit
def _sum_splits(partial_ptr, out_ptr, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out [count] = the sum of partial [SPLITS, count] over splits, first to last."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        acc += tl.load(partial_ptr + split * count + at, mask=at < count, other=0.0)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=at < count)


@triton.jit
def _dequantize(words_ptr, scales_ptr, out_ptr, groups):
    """out [rows, in]: one group of sixteen rows, code * scale."""
    group, block = tl.program_id(0), tl.program_id(1)
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 128)[None, :]
    words = tl.load(words_ptr + (block * groups + group) * 128 + column // 16 * 16 + row)
    code = ((words >> (column % 4 * 8 + column % 16 // 4 * 2)) & 3) - 1
    scales = tl.load(scales_ptr + (block * groups + group) * 16 + row).to(tl.float32)
    at = (block * 16 + row).to(tl.int64) * groups * 128 + group * 128 + column
    tl.store(out_ptr + at, (code.to(tl.float32) * scales).to(out_ptr.dtype.element_ty))


def ternary_matmul(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_size: int = 128) -> torch.Tensor:
    """x [..., in] times the transpose of a packed ternary matrix; twin of `minicpm_ref.lowbit.ternary.ternary_matmul`.

    x float32, float16 or bfloat16; codes uint8 [out / 16, in / 16, 16, 4] and scales float16 [out / 16, in / 128, 16]
    in the rows-in-lanes layout; contiguous, on one GPU. Code bytes are not checked: a pair of bits that is 3 counts as
    weight 2. Returns [..., out] in x's dtype, the same bits on every run. A token that holds NaN, infinity or, in
    bfloat16, a magnitude beyond 2^117 gets NaN in all its outputs; from SCRATCH_TOKENS on, what torch makes of it.

    Raises ValueError for anything else (other group sizes, bfloat16 in the interpreter), RuntimeError when a gradient
    would be needed. Source: MiniCPM4 technical report (arXiv 2506.07900) section 3.3.
    """
    _validate("ternary_matmul", x, codes, scales, group_size)
    flat = x.reshape(-1, x.shape[-1])  # [tokens, in]
    words = codes.view(torch.int32).squeeze(-1)  # [out / 16, in / 16, 16]
    subnormal = _subnormal() and x.dtype != torch.float32
    # the assembly sums in float16, which is enough for bfloat16 results only
    by_vector = x.dtype == torch.bfloat16 or (x.dtype == torch.float16 and not subnormal)
    if len(flat) >= SCRATCH_TOKENS:
        y = F.linear(flat, _dense(words, scales, x.dtype))
    elif len(flat) <= MATVEC_TOKENS and by_vector:
        y = _run_matvec(flat, words, scales, subnormal)
    else:
        y = _run_matmul(flat, words, scales, subnormal)
    return y.view(*x.shape[:-1], words.shape[0] * ROWS)


def _subnormal() -> bool:
    """Whether codes may be read as subnormal float16: on NVIDIA GPUs. Elsewhere they are converted."""
    return on_nvidia()


def _run_matvec(x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, subnormal: bool) -> torch.Tensor:
    """One to four float16 or bfloat16 tokens x [tokens, in] -> [tokens, out]."""
    tokens, (blocks, chunks, _) = len(x), words.shape
    planes, factors, sums = _prepare(x, tokens, subnormal)
    tile = min(128, triton.next_power_of_2(chunks))
    splits, share = _shares(blocks, triton.cdiv(chunks, tile))
    out = _partial(x, splits, blocks * ROWS)
    _matvec[(blocks, splits)](
        words, scales, planes.view(torch.int32), factors, sums, out, blocks * ROWS, chunks, share * tile,
        TOKENS=tokens, CHUNKS=tile, SUBNORMAL=subnormal, num_warps=max(1, tile // 16),
    )  # fmt: skip
    return _add_up(out, x.dtype)


def _run_matmul(x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, subnormal: bool) -> torch.Tensor:
    """x [tokens, in] -> [tokens, out], by tl.dot."""
    tokens, (blocks, chunks, _) = len(x), words.shape
    tile, width, warps = _matmul_tile(tokens, x.dtype)
    padded = triton.cdiv(tokens, width) * width
    planes, factors, sums = _prepare(x, padded, subnormal)
    tiles, groups = triton.cdiv(blocks * ROWS, tile), chunks // 8
    splits, share = _shares(tiles * (padded // width), groups)
    out = _partial(x, splits, blocks * ROWS)
    _matmul[(tiles, padded // width, splits)](
        words, scales, planes, factors, sums, out, tokens, padded, blocks * ROWS, groups, share,
        TOKENS=width, TILE=tile, SUBNORMAL=subnormal, num_warps=warps, num_stages=3,
    )  # fmt: skip
    return _add_up(out, x.dtype)


def _prepare(x: torch.Tensor, padded: int, subnormal: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Planes [padded, 8, in / 8] (float16, or float32 for float32 x), factors and sums [in / 128, padded]."""
    tokens, columns = x.shape
    groups = columns // GROUP
    dtype = torch.float32 if x.dtype == torch.float32 else torch.float16
    planes = torch.empty(padded, 8, columns // 8, dtype=dtype, device=x.device)
    factors = torch.empty(groups, padded, dtype=torch.float32, device=x.device)
    sums = torch.empty_like(factors)
    _planes[(groups, padded)](x, planes, factors, sums, tokens, padded, groups, SUBNORMAL=subnormal, num_warps=1)
    return planes, factors, sums


def _dense(words: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [out, in], code * scale rounded to `dtype`."""
    blocks, chunks, _ = words.shape
    out = torch.empty(blocks * ROWS, chunks * ROWS, dtype=dtype, device=words.device)
    _dequantize[(chunks // 8, blocks)](words, scales, out, chunks // 8)
    return out


def _shares(programs: int, steps: int) -> tuple[int, int]:
    """(splits, share): `steps` loop steps in that many equal shares, the last one perhaps shorter.

    As many as make ENOUGH_PROGRAMS, each of four steps at least.
    """
    wanted = max(1, min(ENOUGH_PROGRAMS // programs, steps // 4))
    share = triton.cdiv(steps, wanted)
    return triton.cdiv(steps, share), share


def _partial(x: torch.Tensor, splits: int, rows: int) -> torch.Tensor:
    """Where a product kernel writes: [splits, tokens, out], the result itself when there is one split."""
    return torch.empty(splits, len(x), rows, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)


def _add_up(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[splits, tokens, out] -> [tokens, out]."""
    if len(partial) == 1:
        return partial[0]
    out = torch.empty_like(partial[0], dtype=dtype)
    count = out.numel()
    _sum_splits[(triton.cdiv(count, 512),)](partial, out, count, SPLITS=len(partial), BLOCK=512)
    return out


def _matmul_tile(tokens: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(rows, tokens, num_warps) of a tile of `_matmul`."""
    if dtype == torch.float32:
        return 32, 16, 4
    if tokens <= 32:
        return 128, 16 if tokens <= 16 else 32, 4
    return 128, 64, 8


def _validate(name: str, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> None:
    if group_size != GROUP:
        raise ValueError(f"{name}: group_size {group_size}, expected {GROUP}, which these kernels are written for")
    require_tensor(name, "x", x, dtypes=DTYPES)
    if x.ndim == 0 or x.numel() == 0 or x.shape[-1] % GROUP:
        raise ValueError(f"{name}: x has shape {list(x.shape)}, expected [..., a multiple of {GROUP}], not empty")
    require_tensor(name, "codes", codes, dtypes=(torch.uint8,), device=x.device)
    blocks, columns = codes.shape[0] if codes.ndim else 0, x.shape[-1]
    require_tensor(name, "codes", codes, (max(1, blocks), columns // ROWS, ROWS, 4))
    require_tensor(name, "scales", scales, (blocks, columns // GROUP, ROWS), (torch.float16,), x.device)
    require_runnable(name, x)


def _configs() -> tuple[CompileConfig, ...]:
    """Every kernel as it is launched for matrices of thousands of rows; subnormal codes on NVIDIA targets only."""
    shared = {"words_ptr": "*i32", "scales_ptr": "*fp16", "factors_ptr": "*fp32", "sums_ptr": "*fp32"}
    name, configs = "ternary_matmul", []
    for x, plane, subnormal in (("bf16", "fp16", True), ("bf16", "fp16", False), ("fp32", "fp32", False)):
        signature = {"x_ptr": f"*{x}", "planes_ptr": f"*{plane}", "factors_ptr": "*fp32", "sums_ptr": "*fp32"}
        signature |= dict.fromkeys(("tokens", "padded", "groups"), "i32")
        label = f"{x}-{'subnormal' if subnormal else 'converted'}"
        configs.append(CompileConfig(name, "_planes", label, signature, {"SUBNORMAL": subnormal}, (), 1))
    for tokens, dtype, subnormal in (
        (1, "bf16", True), (2, "bf16", True), (4, "bf16", True),
        (1, "bf16", False), (4, "bf16", False), (1, "fp16", False),
    ):  # fmt: skip
        signature = shared | {"planes_ptr": "*i32", "out_ptr": f"*{dtype}"}
        signature |= dict.fromkeys(("rows", "chunks", "share"), "i32")
        constexprs = {"TOKENS": tokens, "CHUNKS": 128, "SUBNORMAL": subnormal}
        configs.append(
            CompileConfig(
                name, "_matvec", f"M{tokens}-{dtype}-{'assembly' if subnormal else 'converted'}", signature, constexprs,
                ("rows", "chunks", "share"), 8, targets=NVIDIA if subnormal else TARGETS,
            )  # fmt: skip
        )
    for tokens, dtype, subnormal in (
        (16, torch.bfloat16, True), (32, torch.bfloat16, True), (64, torch.bfloat16, True), (16, torch.bfloat16, False),
        (64, torch.bfloat16, False), (16, torch.float32, False),
    ):  # fmt: skip
        tile, width, warps = _matmul_tile(tokens, dtype)
        short, plane = ("fp32", "fp32") if dtype == torch.float32 else ("bf16", "fp16")
        signature = shared | {"planes_ptr": f"*{plane}", "out_ptr": f"*{short}"}
        signature |= dict.fromkeys(("tokens", "padded", "rows", "groups", "share"), "i32")
        configs.append(
            CompileConfig(
                name, "_matmul", f"M{width}-{short}-{'subnormal' if subnormal else 'converted'}", signature,
                {"TOKENS": width, "TILE": tile, "SUBNORMAL": subnormal}, ("padded", "rows", "groups"), warps, 3,
                targets=NVIDIA if subnormal else TARGETS,
            )  # fmt: skip
        )
    signature = {"partial_ptr": "*fp32", "out_ptr": "*bf16", "count": "i32"}
    configs.append(CompileConfig(name, "_sum_splits", "bf16", signature, {"SPLITS": 4, "BLOCK": 512}, ("count",)))
    signature = {"words_ptr": "*i32", "scales_ptr": "*fp16", "out_ptr": "*bf16", "groups": "i32"}
    configs.append(CompileConfig(name, "_dequantize", "bf16", signature, {}, ("groups",)))
    return tuple(configs)


COMPILE_CONFIGS = _configs()
