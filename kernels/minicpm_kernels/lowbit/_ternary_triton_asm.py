"""Sixteen ternary weights times sixteen activations in 20 instructions: the inner step of the mat-vec on NVIDIA
GPUs.

The problem: a GPU can read two-bit weights faster than it can unpack them. On an H100-class chip the memory delivers
a weight every 1.7 instructions of a lane; shifting out two bits and converting them to a float already costs three.

The idea: do not convert. A word holds sixteen codes u = w + 1 in {0, 1, 2}, eight in each 16-bit half. Masking bit
pair i of both halves leaves two 16-bit patterns that, read as float16, *are* the subnormal numbers u * 4^i * 2^-24
for i = 0 .. 4. The activations that they meet carry the factor 4^-i already (`_planes` in `ternary_triton`), so one
AND and one packed multiply-add serve two weights, and a shift by ten bits brings pairs 5 to 7 down to 0 to 2.

The eight products of a half are summed in float16, the halves and everything after in float32. The rounding of these
short sums is about 7e-4 of the result: less than bfloat16's own rounding and more than float16's. So this serves
bfloat16 activations, and float16 ones go to the tensor cores, which sum in float32.

Left out: tensor cores, which take the same subnormal operands; `ternary_triton` uses them for more tokens.
Source: PTX ISA, `fma.rn.f16x2` (subnormal numbers are supported). The trick is this project's own.
"""

from __future__ import annotations

import triton.language as tl

PAIRS = 8  # bit pairs in a 16-bit half
DIRECT = 5  # pairs that are subnormal numbers where they stand: pair 4 ends at bit 9, the exponent starts at bit 10


def word_products() -> str:
    """PTX: $0 (float32) = the sum of u * 2^-24 * 4^(i mod 5) * plane_i over the sixteen codes of the word $1.

    $2 .. $9 are the planes of bit pairs 0 .. 7, two float16 each.
    """
    lines = [".reg .b32 bits, high, sum;", ".reg .b16 lower, upper;", ".reg .f32 left, right;"]
    for pair in range(PAIRS):
        if pair == DIRECT:
            lines.append("shr.u32 high, $1, 10;")
        source = "$1" if pair < DIRECT else "high"
        lines.append(f"and.b32 bits, {source}, 0x{0x00030003 << 2 * (pair % DIRECT):08x};")
        product = f"bits, ${pair + 2}"
        lines.append(f"fma.rn.f16x2 sum, {product}, sum;" if pair else f"mul.rn.f16x2 sum, {product};")
    lines += ["mov.b32 {lower, upper}, sum;", "cvt.f32.f16 left, lower;", "cvt.f32.f16 right, upper;"]
    return "\n".join(["{", *lines, "add.f32 $0, left, right;", "}"])


CONSTRAINTS = tl.constexpr("=f" + ",r" * (1 + PAIRS))
WORD_PRODUCTS = tl.constexpr(word_products())
