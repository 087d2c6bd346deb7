"""What a CPU's instructions offer to an integer dot product: three answers to one question.

The question: sixteen lanes of four unsigned weights u each, or four signed ones, times four signed activations q that
are the same in all lanes; add the four products of each lane to an int32.

- `avx512_vnni`  vpdpbusd does exactly this for sixteen lanes. It wants one operand unsigned: int8 weights are shifted
                 by 128 (one exclusive or), and 128 times the sum of the activations is taken off again.
- `avx2`         vpmaddubsw: pairs of u8 x s8 products in int16 lanes, which may only be added up while they cannot
                 overflow: thirty-two columns of four-bit weights (8 * 2 * 15 * 127 = 30480), a whole group of ternary
                 ones (64 * 2 * 2 * 127 = 32512 for a group of 256). Then one vpmaddwd widens them. For int8 the sign of
                 the weight is moved to the activation (|w| * sign(w) q), and every pair is widened at once.
- `portable`     generic vector operations that do what vpdpbusd does, which LLVM lowers for whatever the machine has.

All sums are exact integers, so the three return the same bits. Floats are fused multiply-adds where the machine has
them (avx512, avx2), and rounded twice where it has not: float formats may differ between instruction sets, never
between numbers of tokens or threads.

Left out: AVX-VNNI on 256 bits and ARM's sdot (one class more each); AMX.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numba
from numba.core.codegen import get_host_cpu_features

from minicpm_kernels.engine.formats import Format
from minicpm_kernels.engine.llvm import I8, I16, I32, call, fill, splat, vector

Value = Any  # an ir.Value; llvmlite has no type hints


class Portable:
    """Generic vectors of sixteen lanes."""

    name = "portable"
    needs: tuple[str, ...] = ()
    parts = 1  # registers that a group's sixteen lanes are cut into
    fused = False  # multiply-add in one rounding
    half = False  # instructions for float16
    int_tile, float_tile = 4, 4  # the most tokens at once
    row_tile = 4  # query rows at once

    def columns_at_once(self, form: Format) -> int:
        """How many columns may be summed before `finish`."""
        return form.group

    def start(self, form: Format) -> Value:
        """An accumulator of nothing."""
        return fill(vector(I32), 0)

    def weights(self, b: Value, word: Value, form: Format) -> Value:
        """Whatever is done once to four weights a lane, for all tokens."""
        return b.xor(word, fill(word.type, -0x7F7F7F80)) if form.bits == 8 else word  # 0x80808080

    def dot(self, b: Value, total: Value, weights: Value, quad: Value, form: Format) -> Value:
        """total + weights * activations; `quad` is four activations in an int32."""
        words = vector(I16, 2 * total.type.count)
        eight, sixteen = fill(words, 8), fill(total.type, 16)
        u, q = b.bitcast(weights, words), b.bitcast(splat(b, quad, total.type.count), words)
        even_u, odd_u = b.and_(u, fill(words, 0xFF)), b.lshr(u, eight)
        even_q, odd_q = b.ashr(b.shl(q, eight), eight), b.ashr(q, eight)
        for left, right in ((even_u, even_q), (odd_u, odd_q)):  # 255 * 128 fits an int16
            product = b.bitcast(b.mul(left, right), total.type)
            total = b.add(total, b.add(b.ashr(b.shl(product, sixteen), sixteen), b.ashr(product, sixteen)))
        return total

    def finish(self, b: Value, total: Value, form: Format) -> Value:
        """The accumulator as int32 lanes."""
        return total

    def offset(self, form: Format) -> int:
        """What every weight was shifted by to be unsigned: that much times the sum of activations is too much."""
        return 128 if form.bits == 8 else form.offset


class Vnni(Portable):
    """AVX-512 VNNI: one 512-bit register."""

    name = "avx512_vnni"
    needs = ("avx512f", "avx512bw", "avx512vnni", "f16c")
    fused = True
    half = True
    int_tile, float_tile = 8, 8
    row_tile = 8

    def dot(self, b: Value, total: Value, weights: Value, quad: Value, form: Format) -> Value:
        # LLVM 22 retyped the operands from <16 x i32> to <64 x i8>
        operand = vector(I8, 64) if llvmlite.binding.llvm_version_info[0] >= 22 else total.type
        u, q = b.bitcast(weights, operand), b.bitcast(splat(b, quad), operand)
        return call(b, "llvm.x86.avx512.vpdpbusd.512", total.type, total, u, q)


class Avx2(Portable):
    """AVX2: two 256-bit registers of eight lanes."""

    name = "avx2"
    needs = ("avx2", "fma", "f16c")
    parts = 2
    fused = True
    half = True
    int_tile, float_tile = 8, 6
    row_tile = 6

    def columns_at_once(self, form: Format) -> int:
        return min(form.group, 32) if form.bits == 4 else form.group

    def start(self, form: Format) -> Value:
        return fill(vector(I32, 8) if form.bits == 8 else vector(I16, 16), 0)

    def weights(self, b: Value, word: Value, form: Format) -> Value:
        return word

    def dot(self, b: Value, total: Value, weights: Value, quad: Value, form: Format) -> Value:
        octets, words = vector(I8, 32), vector(I16, 16)
        w, q = b.bitcast(weights, octets), b.bitcast(splat(b, quad, 8), octets)
        if form.bits != 8:
            return b.add(total, call(b, "llvm.x86.avx2.pmadd.ub.sw", words, w, q))
        negative = b.icmp_signed("<", w, fill(octets, 0))
        size = b.select(negative, b.neg(w), w)  # -128 stays 0x80, which is 128 when read unsigned
        signed = call(b, "llvm.x86.avx2.psign.b", octets, q, w)
        return b.add(total, self._widen(b, call(b, "llvm.x86.avx2.pmadd.ub.sw", words, size, signed)))

    def finish(self, b: Value, total: Value, form: Format) -> Value:
        return total if form.bits == 8 else self._widen(b, total)

    def offset(self, form: Format) -> int:
        return form.offset

    @staticmethod
    def _widen(b: Value, pairs: Value) -> Value:
        """The sum of the two int16 halves of every 32-bit lane."""
        result = vector(I32, 8)
        ones = fill(vector(I16, 16), 1)
        return call(b, "llvm.x86.avx2.pmadd.wd", result, pairs, ones)


# best first
INSTRUCTION_SETS: dict[str, Portable] = {isa.name: isa for isa in (Vnni(), Avx2(), Portable())}


def supported() -> list[str]:
    """The instruction sets that numba may use on this CPU, best first."""
    given = numba.config.CPU_FEATURES  # NUMBA_CPU_FEATURES compiles for another CPU
    features = (get_host_cpu_features() if given is None else given).split(",")
    return [name for name, isa in INSTRUCTION_SETS.items() if all(f"+{need}" in features for need in isa.needs)]


def subtract_offset(b: Value, dot: Value, total: Value, offset: int) -> Value:
    """dot - offset * total for an offset that is a power of two; `total` is an int32, the same for all lanes."""
    wide = splat(b, total, dot.type.count)
    return b.sub(dot, b.shl(wide, fill(dot.type, offset.bit_length() - 1)))
