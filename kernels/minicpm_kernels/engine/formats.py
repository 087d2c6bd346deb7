"""Weight formats of the CPU engine, and how a matrix becomes one stream of bytes.

Problem. A decode step is worth as much as the bytes it does not read. So weights stay in the few bits of their format
until they are in a register, and they lie in memory in the order in which the products read them.

Idea. *Rows in lanes*: sixteen output rows stand side by side, one 32-bit lane each, and no sum is ever taken across
lanes. A matrix is one stream: block of sixteen rows after block, inside a block group of columns after group. A group
holds, for its sixteen rows,

    float32     one float a row and column:            [column][16]
    bfloat16    two columns in a lane:                 [column / 2][16][2]
    integers    chunks of 64 bytes, four in a lane:    [chunk][16][4], then scales [16] in float16, then minimums [16]

A byte of an integer chunk holds 8 / bits columns. Byte j of a lane of chunk c has, in its p-th bits, column
4 (c * per + p) + j with per = 8 / bits: one shift and one mask leave four neighbouring columns in the lane, which are
multiplied by four neighbouring activations at once.

A weight is (code - offset) * scale, or code * scale + minimum. `int8`, `int4` and `int4_1` with their groups of 32 are
the numbers of GGUF's Q8_0, Q4_0 and Q4_1, bit for bit, in another order; `ternary256` those of TQ2_0.

Left out: formats with scales of scales (K-quants), base-3 codes. Source of the first layout of this kind here:
`minicpm_kernels.ternary_cpu`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROWS = 16  # output rows in lanes
FLOAT_GROUP = 32  # columns that a float format sums before it adds them to the total


@dataclass(frozen=True)
class Format:
    """One way to hold a weight.

    `bits` a weight; `group` columns share a scale (float formats: are summed together); `offset` is what a code of 0
    stands for, so codes are stored unsigned, except those of int8; `minimum`: a group has one beside its scale.
    """

    name: str
    bits: int
    group: int
    offset: int = 0
    minimum: bool = False

    @property
    def is_float(self) -> bool:
        """Whether weights are numbers of their own, and activations stay float32."""
        return self.bits >= 16

    @property
    def group_bytes(self) -> int:
        """Bytes of one group of sixteen rows."""
        scales = 0 if self.is_float else 2 * ROWS * (2 if self.minimum else 1)
        return self.group * ROWS * self.bits // 8 + scales

    @property
    def bits_per_weight(self) -> float:
        """With scales."""
        return 8 * self.group_bytes / (self.group * ROWS)


FORMATS = {
    form.name: form
    for form in (
        Format("float32", 32, FLOAT_GROUP),
        Format("bfloat16", 16, FLOAT_GROUP),
        Format("int8", 8, 32),
        Format("int4", 4, 32, offset=8),
        Format("int4_1", 4, 32, minimum=True),
        Format("int4_128", 4, 128, offset=8),
        Format("ternary128", 2, 128, offset=1),
        Format("ternary256", 2, 256, offset=1),
    )
}


def find_format(name: str) -> Format:
    """The entry of `FORMATS`; raises ValueError for a name that is not there."""
    if name not in FORMATS:
        raise ValueError(f"format {name!r}: expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def padded(count: int, multiple: int) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple


def packed_bytes(rows: int, columns: int, form: Format) -> int:
    """Bytes of a matrix [rows, columns]; rows are filled up to sixteen, columns to a group."""
    return padded(rows, ROWS) // ROWS * (padded(columns, form.group) // form.group) * form.group_bytes


def pack_floats(weight: NDArray[np.float32], form: Format) -> NDArray[np.uint8]:
    """A matrix [rows, columns] in a float format as its stream; bfloat16 is rounded to nearest even.

    Raises ValueError for a format of integers.
    """
    if not form.is_float:
        raise ValueError(f"format {form.name}: expected float32 or bfloat16; quantize first, then pack_codes")
    filled = _fill(np.asarray(weight, np.float32), form.group, 0.0)
    blocks, columns = filled.shape[0] // ROWS, filled.shape[1]
    if form.name == "float32":
        lanes = filled.reshape(blocks, ROWS, columns).transpose(0, 2, 1)
        return np.ascontiguousarray(lanes).view(np.uint8).reshape(-1)
    bits = np.ascontiguousarray(filled).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    rounded[np.isnan(filled)] = 0x7FC0  # the sum above would carry NaN's mantissa into the sign
    lanes = rounded.reshape(blocks, ROWS, columns // 2, 2).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(lanes).view(np.uint8).reshape(-1)


def pack_codes(
    codes: NDArray[np.integer],
    scales: NDArray[np.float16],
    form: Format,
    minimums: NDArray[np.float16] | None = None,
    name: str = "codes",
) -> NDArray[np.uint8]:
    """Codes [rows, columns] and scales [rows, columns / group] as the format's stream.

    Codes are signed around 0 (int8: -128..127, int4: -8..7, ternary: -1..1) except with minimums [rows, columns /
    group] (int4_1: 0..15). Columns are filled up with zero weights. Raises ValueError, naming the tensor, for codes out
    of range and shapes that do not belong together.
    """
    rows, columns = codes.shape
    low, high = (0, 15) if form.minimum else (-128, 127) if form.bits == 8 else (-form.offset, form.offset - 1)
    high = 1 if form.bits == 2 else high
    if form.is_float or columns % form.group or scales.shape != (rows, columns // form.group):
        raise ValueError(
            f"{name}: codes {list(codes.shape)} and scales {list(scales.shape)}, expected [rows, columns] and "
            f"[rows, columns / {form.group}] for {form.name}"
        )
    if codes.size and not low <= int(codes.min()) <= int(codes.max()) <= high:
        raise ValueError(f"{name}: codes {codes.min()}..{codes.max()}, expected {low}..{high} for {form.name}")
    if form.minimum != (minimums is not None) or (minimums is not None and minimums.shape != scales.shape):
        raise ValueError(f"{name}: {form.name} takes {'minimums like its scales' if form.minimum else 'no minimums'}")
    digits = (codes.astype(np.int16) + form.offset).astype(np.uint8)  # int8 keeps its sign bit
    digits = _fill(digits, form.group, form.offset)
    blocks, groups, per = digits.shape[0] // ROWS, columns // form.group, 8 // form.bits
    split = digits.reshape(blocks, ROWS, groups, form.group // (4 * per), per, 4).transpose(0, 2, 3, 4, 1, 5)
    stream = np.zeros((blocks, groups, form.group_bytes), np.uint8)
    chunks = np.zeros((blocks, groups, form.group // (4 * per), ROWS, 4), np.uint8)
    for place in range(per):
        chunks |= split[:, :, :, place] << np.uint8(form.bits * place)
    size = chunks[0, 0].size
    stream[:, :, :size] = chunks.reshape(blocks, groups, -1)
    for i, values in enumerate((scales, minimums) if minimums is not None else (scales,)):
        lanes = _fill(np.asarray(values, np.float16), 1, 0.0).reshape(blocks, ROWS, groups).transpose(0, 2, 1)
        at = size + 2 * ROWS * i
        stream[:, :, at : at + 2 * ROWS] = np.ascontiguousarray(lanes).view(np.uint8).reshape(blocks, groups, -1)
    return stream.reshape(-1)


def _fill(values: NDArray, multiple: int, filler: float) -> NDArray:
    """Rows up to the next sixteen and columns up to the next multiple."""
    rows, columns = values.shape
    right, below = padded(columns, multiple) - columns, padded(rows, ROWS) - rows
    if not right and not below:
        return values
    return np.pad(values, ((0, below), (0, right)), constant_values=filler)
