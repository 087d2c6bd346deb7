"""Checkers of 09_ternary_matmul: the speed that bytes allow, addresses in the rows-in-lanes layout, and codes that are
floats already."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minicpm_ref.exercises import Operations, attempt
from minicpm_ref.lowbit.packing import to_lanes

ARITHMETIC = ("mul", "div", "pow", "ldexp", "add", "sub", "sum")
CONVERSION = ("_to_copy", "to", "type_as")


def check_speedup(speedup: Callable[[int, float, float, float], float]) -> str:
    """Check `speedup(tokens, bandwidth, float_rate, int8_rate)`: time of bfloat16 weights / time of ternary ones."""

    def check() -> None:
        found = speedup(1, 25e9, 64e9, 200e9)
        assert not math.isclose(found, 8, rel_tol=1e-6), "the scales are read, too: 2 + 16 / 128 bits a weight"
        assert math.isclose(found, 16 / 2.125, rel_tol=1e-6), f"one token: bytes decide, 7.53; got {found:.3g}"
        found = speedup(1000, 25e9, 64e9, 200e9)
        assert math.isclose(found, 200 / 64, rel_tol=1e-6), f"1000 tokens: arithmetic decides, 3.125; got {found:.3g}"
        found = speedup(4, 25e9, 64e9, 200e9)
        expected = (2 / 25e9) / (4 / 200e9)
        assert math.isclose(found, expected, rel_tol=1e-6), (
            f"4 tokens: bfloat16 still waits for memory and ternary already for arithmetic, {expected:.3g}; "
            f"got {found:.3g}"
        )
        found = speedup(1, 4.3e12, 4e14, 1e11)
        assert math.isclose(found, (2 / 4.3e12) / (1 / 1e11), rel_tol=1e-6), (
            "slow arithmetic can lose what the bytes gain: the ratio may be below 1"
        )

    return attempt("speedup", check)


def check_address(address: Callable[[int, int, int], tuple[int, int]]) -> str:
    """Check `address(row, column, columns)`: (byte, shift) of a code in the rows-in-lanes layout of `columns`
    columns."""

    def check() -> None:
        for rows, columns in ((16, 16), (16, 64), (48, 16), (32, 48)):
            stored = torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
            data = to_lanes(stored).flatten().tolist()
            for row in range(rows):
                for column in range(columns):
                    byte, shift = address(row, column, columns)
                    where = f"row {row}, column {column} of {columns}"
                    assert 0 <= byte < len(data), f"{where}: byte {byte} of {len(data)}"
                    assert shift in (0, 2, 4, 6), f"{where}: shift {shift}, expected 0, 2, 4 or 6"
                    found, expected = (data[byte] >> shift & 3) - 1, int(stored[row, column])
                    assert found == expected, f"{where}: byte {byte}, shift {shift} holds {found}, not {expected}"

    return attempt("address", check)


def check_digits_as_floats(digits_as_floats: Callable[[Tensor], Tensor]) -> str:
    """Check `digits_as_floats(halves)`: int16 [n] -> float16 [n, 8] without arithmetic or conversion."""

    def check() -> None:
        digits = torch.randint(0, 3, (64, 8), generator=torch.Generator().manual_seed(0))
        digits[0], digits[1] = 2, torch.tensor([0, 0, 0, 0, 0, 0, 0, 2])  # the sign bit is set
        words = sum(digits[:, pair] << 2 * pair for pair in range(8))
        assert isinstance(words, Tensor)
        halves = (words - (words >> 15 << 16)).to(torch.int16)
        with Operations() as used:
            found = digits_as_floats(halves.clone())
        assert found.dtype == torch.float16, f"expected float16, got {found.dtype}"
        assert tuple(found.shape) == (64, 8), f"expected shape [64, 8], got {list(found.shape)}"
        for pair in range(8):
            expected = digits[:, pair] * 4.0 ** (pair % 5) * 2.0**-24
            wrong = (found[:, pair].double() != expected).nonzero().flatten().tolist()
            assert not wrong, (
                f"pair {pair}, digit {int(digits[wrong[0], pair])}: expected {expected[wrong[0]] * 2**24:.0f} * 2^-24, "
                f"got {found[wrong[0], pair].double() * 2**24:.6g} * 2^-24"
            )
        forbidden = used.names & set(ARITHMETIC + CONVERSION)
        assert not forbidden, f"masks, shifts and views are enough; this uses {', '.join(sorted(forbidden))}"

    return attempt("digits_as_floats", check)
