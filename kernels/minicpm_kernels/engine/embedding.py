"""One row of a packed matrix back to floats: the embedding of a token.

A tied model reads its output matrix as the embedding, so the engine looks tokens up in the packed stream instead of
keeping a second copy.
"""

from __future__ import annotations

from llvmlite import ir
from numba import float32, int64, void
from numba.extending import intrinsic

from minicpm_kernels.engine.formats import FORMATS
from minicpm_kernels.engine.instruction_sets import INSTRUCTION_SETS
from minicpm_kernels.engine.llvm import I16, I32, from_bfloat, from_half, load, number, vector
from minicpm_kernels.engine.memory import byte_at, float_at, put_float


@intrinsic(prefer_literal=True)
def _short_float(typing_context, isa, is_bfloat, address):  # type: ignore[no-untyped-def]
    """The float16 (or bfloat16) at an address as float32."""
    hardware, bfloat = INSTRUCTION_SETS[isa.literal_value].half, is_bfloat.literal_value
    signature = float32(isa, is_bfloat, int64)

    def codegen(context, b, sig, args):  # type: ignore[no-untyped-def]
        bits = ir.Constant(vector(I16, 1), ir.Undefined)
        bits = b.insert_element(bits, load(b, args[2], I16, 2), number(0, I32))
        value = from_bfloat(b, bits) if bfloat else from_half(b, bits, hardware)
        return b.extract_element(value, number(0, I32))

    return signature, codegen


def row_reader(isa: str, form: str):  # type: ignore[no-untyped-def]
    """The function read(w, row, groups, first, last, out) to be compiled: columns first..last - 1 of a row of the
    stream w as float32 at out (the address of column 0). All arguments are int64."""
    kind = FORMATS[form]
    bits, group, group_bytes, offset = kind.bits, kind.group, kind.group_bytes, kind.offset
    minimum = kind.minimum
    per = max(1, 8 // bits)
    codes_bytes, mask, signed = group * 16 * bits // 8, (1 << bits) - 1, bits == 8

    def read(w, row, groups, first, last, out):  # type: ignore[no-untyped-def]
        lane = row % 16
        for column in range(first, last):
            g, c = column // group, column % group
            at = w + (row // 16 * groups + g) * group_bytes
            if bits == 32:
                value = float_at(at + 4 * (16 * c + lane))
            elif bits == 16:
                value = _short_float(isa, 1, at + 2 * (32 * (c // 2) + 2 * lane + c % 2))
            else:
                chunk, place, byte = c // (4 * per), c // 4 % per, c % 4
                code = byte_at(at + 64 * chunk + 4 * lane + byte) >> (bits * place) & mask
                if signed and code >= 128:
                    code -= 256
                scale = _short_float(isa, 0, at + codes_bytes + 2 * lane)
                value = float32(code - offset) * scale
                if minimum:
                    value = value + _short_float(isa, 0, at + codes_bytes + 32 + 2 * lane)
            put_float(value, out + 4 * column)

    return read


READ = void(*[int64] * 6)
