"""The weights of a model as one stream of bytes, in the order in which a step reads them.

A step asks memory for every matrix once, so a stream is the best there is: q k v as one matrix, o, gate and up as one
(sixteen rows of each in turn, so that the thread that has a gate also has its up), down, next layer, and at last the
output matrix. A tied model looks its embedding up in the output matrix; another has it behind that, in the same format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minicpm_kernels.engine.formats import ROWS, Format, pack_codes, pack_floats, packed_bytes, padded
from minicpm_kernels.engine.memory import allocate


@dataclass(frozen=True)
class Codes:
    """A matrix of integers: codes [rows, columns], scales and, in a format with minimums, minimums [rows, columns /
    group] in float16. Which integers: `formats.pack_codes`."""

    codes: NDArray[np.int8]
    scales: NDArray[np.float16]
    minimums: NDArray[np.float16] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.codes.shape
        return rows, columns


Matrix = NDArray[np.float32] | Codes


@dataclass(frozen=True)
class LayerMatrices:
    """The seven matrices of a layer, each [out, in]; float32 in a float format, `Codes` otherwise."""

    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix


@dataclass(frozen=True)
class Stream:
    """The packed matrices, and where each begins: int64 [layers + 1, 4], the last row being head and embedding."""

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]


def pack_model(
    layers: Iterable[LayerMatrices],
    count: int,
    head: Matrix,
    embedding: Matrix | None,
    form: Format,
    head_form: Format,
    width: int,
    attended: int,
    ffn: int,
) -> Stream:
    """Pack `count` layers, one after another, and the output matrix.

    `width`, `attended` and `ffn` are the columns that operands have: C, H * D and F filled up to the formats' groups.
    Raises ValueError for matrices that do not fit the format.
    """
    offsets = np.zeros((count + 1, 4), np.int64)
    data, end = allocate(0), 0

    def append(matrix: Matrix, columns: int, kind: Format) -> int:
        """Put a matrix behind the others."""
        nonlocal end
        packed = _pack(_widen(matrix, matrix.shape[0], columns, kind), kind)
        start, end = end, end + packed.nbytes
        data[start:end] = packed
        return start

    for index, layer in enumerate(layers):
        qkv = _join((layer.q, layer.k, layer.v), np.concatenate)
        gate, up = (_widen(part, ffn, part.shape[1], form) for part in (layer.gate, layer.up))
        gate_up = _join((gate, up), _alternate)
        parts = ((qkv, width), (layer.o, attended), (gate_up, width), (layer.down, ffn))
        if index == 0:  # all layers are alike, so now the whole is known
            size = count * sum(packed_bytes(part.shape[0], columns, form) for part, columns in parts)
            tables = [table for table in (head, embedding) if table is not None]
            size += sum(packed_bytes(table.shape[0], width, head_form) for table in tables)
            data = allocate(size)
        offsets[index] = [append(part, columns, form) for part, columns in parts]
    offsets[count, :2] = append(head, width, head_form)
    if embedding is not None:
        offsets[count, 1] = append(embedding, width, head_form)
    return Stream(data, offsets)


def _pack(matrix: Matrix, form: Format) -> NDArray[np.uint8]:
    if isinstance(matrix, Codes):
        return pack_codes(matrix.codes, matrix.scales, form, matrix.minimums)
    return pack_floats(matrix, form)


def _widen(matrix: Matrix, rows: int, columns: int, form: Format) -> Matrix:
    """Zero weights below and to the right."""

    def fill(values: NDArray, count: int) -> NDArray:
        missing = rows - values.shape[0], count - values.shape[1]
        return np.pad(values, ((0, missing[0]), (0, missing[1]))) if any(missing) else values

    if not isinstance(matrix, Codes):
        return fill(matrix, columns)
    scales = fill(matrix.scales, columns // form.group)
    minimums = None if matrix.minimums is None else fill(matrix.minimums, columns // form.group)
    return Codes(fill(matrix.codes, columns), scales, minimums)


def _join(parts: tuple[Matrix, ...], how: Callable[[tuple[NDArray, ...]], NDArray]) -> Matrix:
    """Matrices of one kind below one another, or in turn."""
    if isinstance(parts[0], Codes):
        minimums = None if parts[0].minimums is None else how(tuple(part.minimums for part in parts))
        return Codes(how(tuple(p.codes for p in parts)), how(tuple(p.scales for p in parts)), minimums)
    return how(parts)


def _alternate(parts: tuple[NDArray, ...]) -> NDArray:
    """Sixteen rows of the first, sixteen of the second, and so on."""
    stacked = np.stack([part.reshape(-1, ROWS, part.shape[1]) for part in parts], axis=1)
    return stacked.reshape(-1, parts[0].shape[1])


def operand_columns(count: int, *formats: Format) -> int:
    """Columns up to the longest group of the formats, whose groups are powers of two."""
    return padded(count, max(form.group for form in formats))
