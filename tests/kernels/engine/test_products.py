"""Products of every format and instruction set against float64, and against one another in bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from minicpm_kernels.engine.compiling import compile_address
from minicpm_kernels.engine.embedding import READ, row_reader
from minicpm_kernels.engine.formats import FORMATS, Format, pack_codes, pack_floats
from minicpm_kernels.engine.instruction_sets import supported
from minicpm_kernels.engine.operands import WRITE, operand_writer
from minicpm_kernels.engine.products import MATMUL, matrix_product, tile_size
from minicpm_ref.lowbit.ternary import quantize_activations

ROWS, GROUPS, TOKENS = 48, 3, 11


@dataclass
class Case:
    """Weights [rows, columns] as a stream and as float64, and activations [T, columns]."""

    form: Format
    stream: np.ndarray
    weight: np.ndarray
    x: np.ndarray


def case_of(name: str) -> Case:
    form, rng = FORMATS[name], np.random.default_rng(5)
    columns = GROUPS * form.group
    x = (rng.standard_normal((TOKENS, columns)) * np.exp(rng.standard_normal(columns))).astype(np.float32)
    x[3] = 0
    if form.is_float:
        weight = rng.standard_normal((ROWS, columns)).astype(np.float32)
        stream = pack_floats(weight, form)
        if name == "bfloat16":
            weight = torch.from_numpy(weight).bfloat16().float().numpy()
        return Case(form, stream, weight.astype(np.float64), x)
    low, high = (0, 15) if form.minimum else {8: (-128, 127), 4: (-8, 7), 2: (-1, 1)}[form.bits]
    codes = rng.integers(low, high + 1, (ROWS, columns)).astype(np.int8)
    codes[0], codes[1] = low, high  # what overflows first
    scales = rng.standard_normal((ROWS, GROUPS)).astype(np.float16)  # of either sign
    scales[2] = 2.0**-20  # a subnormal float16
    minimums = rng.standard_normal((ROWS, GROUPS)).astype(np.float16) if form.minimum else None
    weight = codes * np.repeat(scales.astype(np.float64), form.group, axis=1)
    if minimums is not None:
        weight = weight + np.repeat(minimums.astype(np.float64), form.group, axis=1)
    return Case(form, pack_codes(codes, scales, form, minimums), weight, x)


def multiply(case: Case, isa: str, tile: int, last: int = ROWS // 16) -> np.ndarray:
    """y [T, rows] in tiles of at most so many tokens."""
    form = case.form
    product = compile_address(f"matmul_{isa}_{form.name}", MATMUL, matrix_product(isa, form.name))
    writer = compile_address(f"write_{form.name}", WRITE, operand_writer(form.name))
    operand = np.zeros(4 * case.x.size, np.uint8)
    scales, sums = np.zeros(TOKENS * GROUPS, np.float32), np.zeros(TOKENS * GROUPS, np.int32)
    tiles = np.array([(first, min(tile, TOKENS - first)) for first in range(0, TOKENS, tile)])
    buffers = [array.ctypes.data for array in (operand, scales, sums)]
    for first, n in tiles.tolist():
        for t in range(first, first + n):
            writer.ctypes(case.x[t].ctypes.data, *buffers, first, n, t - first, GROUPS, 0, GROUPS)
    y = np.full((TOKENS, ROWS), np.nan, np.float32)
    at = case.stream.ctypes.data
    product.ctypes(at, *buffers, y.ctypes.data, tiles.ctypes.data, len(tiles), GROUPS, 0, last, 4 * ROWS)
    return y


def exact(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64, of activations as the format sees them, and the sum of the magnitudes of its terms."""
    x = case.x.astype(np.float64)
    if not case.form.is_float:
        q, scales = quantize_activations(torch.from_numpy(case.x), case.form.group)
        x = (q.double() * scales.double()[..., None]).flatten(1).numpy()
    return x @ case.weight.T, np.abs(x) @ np.abs(case.weight).T


@pytest.mark.parametrize("name", FORMATS)
def test_products_are_right_and_the_same_in_every_tile(name: str) -> None:
    case, found = case_of(name), {}
    expected, size = exact(case)
    # a chain of additions: each of the group's columns, then of the groups, may round what it adds to
    terms = case.form.group + GROUPS if case.form.is_float else 3 * GROUPS
    for isa in supported():
        found[isa] = multiply(case, isa, 1)
        assert (np.abs(found[isa] - expected) <= terms * 2.0**-24 * size).all()
        for tile in range(2, tile_size(isa, name) + 1):
            np.testing.assert_array_equal(multiply(case, isa, tile), found[isa])
    if not case.form.is_float:  # exact integers, and one order of float operations
        assert all((other == found[supported()[0]]).all() for other in found.values())


@pytest.mark.parametrize("name", ["int8", "int4_1"])
def test_a_scale_of_the_wrong_group_is_caught(name: str) -> None:
    case = case_of(name)
    expected, size = exact(case)
    blocks = case.stream.reshape(ROWS // 16, GROUPS, case.form.group_bytes)
    codes = 16 * case.form.group * case.form.bits // 8
    blocks[:, :, codes:] = np.roll(blocks[:, :, codes:], 1, axis=1)
    assert not (np.abs(multiply(case, supported()[0], 4) - expected) <= 3 * GROUPS * 2.0**-24 * size).all()


@pytest.mark.parametrize("name", ["float32", "int8", "int4_1"])
def test_a_token_of_nan_or_infinity_poisons_itself_only(name: str) -> None:
    case = case_of(name)
    expected = multiply(case, supported()[0], 4)
    case.x[5, 7], case.x[6, 0] = np.nan, np.inf
    found = multiply(case, supported()[0], 4)
    assert not np.isfinite(found[5:7]).any()
    others = [t for t in range(TOKENS) if t not in (5, 6)]
    np.testing.assert_array_equal(found[others], expected[others])


def test_nothing_is_written_beyond_the_blocks_asked_for() -> None:
    found = multiply(case_of("float32"), supported()[0], 1, last=2)
    assert np.isfinite(found[:, :32]).all()
    assert np.isnan(found[:, 32:]).all()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8"])
def test_a_row_is_read_back(name: str) -> None:
    case, isa = case_of(name), supported()[0]
    reader = compile_address(f"read_{isa}_{name}", READ, row_reader(isa, name))
    for row in (0, 17, 47):
        out = np.full(case.weight.shape[1], np.nan, np.float32)
        reader.ctypes(case.stream.ctypes.data, row, GROUPS, 2, len(out) - 1, out.ctypes.data)
        np.testing.assert_array_equal(out[2:-1], case.weight[row, 2:-1].astype(np.float32))
        assert np.isnan(out[[0, 1, -1]]).all()


def test_what_does_not_fit_a_format_is_refused() -> None:
    codes, scales = np.zeros((16, 64), np.int8), np.zeros((16, 2), np.float16)
    with pytest.raises(ValueError, match=r"-9\.\.0, expected -8\.\.7"):
        pack_codes(codes - np.eye(16, 64, dtype=np.int8) * 9, scales, FORMATS["int4"])
    with pytest.raises(ValueError, match="takes no minimums"):
        pack_codes(codes, scales, FORMATS["int4"], scales)
    with pytest.raises(ValueError, match=r"scales \[16, 3\]"):
        pack_codes(codes, np.zeros((16, 3), np.float16), FORMATS["int8"])
    with pytest.raises(ValueError, match="expected float32 or bfloat16"):
        pack_floats(np.zeros((16, 32), np.float32), FORMATS["int8"])
