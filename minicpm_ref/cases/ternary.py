"""Cases of ternary weights: the quantizer, its grids, the bytes, and the packed product.

Where these go wrong: groups that cross from one row to the next (rows with one group, and with several); rounding at
the halfway points (`ties`, whose quotients w / s are exactly one half); a group of zeros, whose scale must not be
zero; base-3 streams whose length is not a multiple of five.

The product reduces over `in` in groups of 128 and runs tokens in tiles, so its rows stand below, at and above tiles
of 1, 2, 4, 8 and 16 tokens. `saturating` has all digits at 2 and all activations at the int8 limit: the largest sums
there are. `outlier` leaves one activation in a group that keeps any bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minicpm_ref.lowbit.packing import scales_to_lanes, to_lanes


def _codes(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)


@dataclass(frozen=True)
class QuantizeCase:
    """One row: `quantize(w, group_size)` with w [rows, columns] of standard deviation `std`; `kind` bends the
    values.
    """

    name: str
    rows: int
    columns: int
    group_size: int = 128
    std: float = 0.02
    kind: str = "normal"
    seed: int = 0

    def weight(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """w [rows, columns]."""
        generator = torch.Generator().manual_seed(self.seed)
        w = self.std * torch.randn(self.rows, self.columns, generator=generator)
        if self.kind == "ties":  # mean |w| is 1, so the quotients are 1/2 and 3/2
            w = torch.tensor([0.5, -0.5, 1.5, -1.5]).repeat(self.rows, self.columns // 4)
        if self.kind == "zero-group":
            w[0, : self.group_size] = 0
        if self.kind == "outlier":
            w[:, 3] = 100 * self.std
        return w.to(device, dtype)

    def build(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[Tensor, int]:
        """(w, group_size)."""
        return self.weight(dtype, device), self.group_size


@dataclass(frozen=True)
class FakeQuantizeCase(QuantizeCase):
    """One row: `fake_quantize(w, group_size, grid)`."""

    grid: str = "ternary"

    def build(  # type: ignore[override]  # one argument more
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, int, str]:
        """(w, group_size, grid)."""
        return self.weight(dtype, device), self.group_size, self.grid


@dataclass(frozen=True)
class DequantizeCase:
    """One row: `dequantize(codes, scales, group_size)`."""

    name: str
    rows: int
    columns: int
    group_size: int = 128
    seed: int = 0

    def build(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor, int]:
        """(codes int8 [rows, columns], scales float16 [rows, columns / group_size], group_size); no use for `dtype`."""
        generator = torch.Generator().manual_seed(self.seed)
        codes = _codes(self.rows, self.columns, generator)
        scales = 0.01 + 0.02 * torch.rand(self.rows, self.columns // self.group_size, generator=generator)
        return codes.to(device), scales.to(device, torch.float16), self.group_size


@dataclass(frozen=True)
class PackCase:
    """One row: `pack(codes, packing)`."""

    name: str
    rows: int
    columns: int
    packing: str
    seed: int = 0

    def build(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[Tensor, str]:
        """(codes int8 [rows, columns], packing); no use for `dtype`."""
        return _codes(self.rows, self.columns, torch.Generator().manual_seed(self.seed)).to(device), self.packing


@dataclass(frozen=True)
class ToLanesCase:
    """One row: `to_lanes(codes)` with codes [rows, columns]."""

    name: str
    rows: int
    columns: int
    seed: int = 0

    def build(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[Tensor]:
        """(codes int8 [rows, columns],); no use for `dtype`."""
        return (_codes(self.rows, self.columns, torch.Generator().manual_seed(self.seed)).to(device),)


@dataclass(frozen=True)
class TernaryMatmulCase:
    """One row: `ternary_matmul(x, codes, scales, group_size)` and `ternary_matmul_int8`, with x [*leading, columns]."""

    name: str
    leading: tuple[int, ...]
    rows: int
    columns: int
    kind: str = "normal"
    group_size: int = 128
    seed: int = 0

    def build(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """(x [*leading, columns], codes and scales in the rows-in-lanes layout, group_size)."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(*self.leading, self.columns, generator=generator)
        codes = _codes(self.rows, self.columns, generator)
        scales = 0.01 + 0.02 * torch.rand(self.rows, self.columns // self.group_size, generator=generator)
        if self.kind == "saturating":
            x, codes = torch.ones_like(x), torch.ones_like(codes)
        if self.kind == "zero-group":
            x[..., : self.group_size] = 0
        if self.kind == "outlier":
            x[..., 5] = 1e4
        if self.kind == "tiny":  # the scale of the activations would be a subnormal float32
            x = x * 1e-38
        if self.kind == "subnormal-scales":
            scales = scales * 2.0**-14
        return (
            x.to(device, dtype),
            to_lanes(codes).to(device),
            scales_to_lanes(scales.half()).to(device),
            self.group_size,
        )


_WEIGHTS = (
    ("one-group", 1, 16, 16, "normal"),
    ("one-row", 1, 256, 128, "normal"),
    ("prime-rows", 7, 128, 128, "normal"),
    ("several-groups", 5, 384, 128, "normal"),
    ("small-groups", 6, 96, 32, "normal"),
    ("odd-groups", 4, 15, 5, "normal"),
    ("ties", 3, 64, 32, "ties"),
    ("zero-group", 3, 256, 128, "zero-group"),
    ("outlier", 4, 256, 128, "outlier"),
)

QUANTIZE: tuple[QuantizeCase, ...] = (
    *(QuantizeCase(name, rows, columns, group, kind=kind) for name, rows, columns, group, kind in _WEIGHTS),
    QuantizeCase("large-weights", 3, 128, std=100.0),
    QuantizeCase("small-weights", 3, 128, std=1e-4),
)

FAKE_QUANTIZE: tuple[FakeQuantizeCase, ...] = tuple(
    FakeQuantizeCase(f"{grid}-{name}", rows, columns, group, kind=kind, grid=grid)
    for grid in ("ternary", "asymmetric4", "half4", "nonzero4", "five")
    for name, rows, columns, group, kind in _WEIGHTS
    if kind not in ("ties", "zero-group") or grid == "ternary"  # the nearest level is not unique there
)

DEQUANTIZE: tuple[DequantizeCase, ...] = tuple(
    DequantizeCase(name, rows, columns, group) for name, rows, columns, group, kind in _WEIGHTS if kind == "normal"
)

PACK: tuple[PackCase, ...] = tuple(
    PackCase(f"{packing}-{name}", rows, columns, packing)
    for packing in ("2bit", "base3")
    for name, rows, columns in (
        ("one-byte", 1, 4),
        ("short", 1, 8),
        ("one-row", 1, 128),
        ("prime-rows", 7, 36),
        ("square", 16, 16),
    )
) + (PackCase("base3-odd", 3, 7, "base3"), PackCase("base3-exact", 5, 5, "base3"))

TO_LANES: tuple[ToLanesCase, ...] = (
    ToLanesCase("one-chunk", 16, 16),
    ToLanesCase("one-block", 16, 128),
    ToLanesCase("one-chunk-a-block", 48, 16),
    ToLanesCase("prime-blocks", 7 * 16, 3 * 16),
)

TERNARY_MATMUL: tuple[TernaryMatmulCase, ...] = (
    TernaryMatmulCase("one-token-one-block", (1,), 16, 128),
    TernaryMatmulCase("vector", (), 48, 256),
    *(
        TernaryMatmulCase(f"tokens-{tokens}", (tokens,), 32, 256)
        for tokens in (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33)
    ),
    TernaryMatmulCase("prime-blocks", (2,), 7 * 16, 384),
    TernaryMatmulCase("many-groups", (1,), 16, 1024),
    TernaryMatmulCase("batch", (2, 3), 64, 128),
    TernaryMatmulCase("saturating-1", (1,), 32, 256, "saturating"),
    TernaryMatmulCase("saturating-6", (6,), 32, 256, "saturating"),
    TernaryMatmulCase("zero-group", (3,), 32, 256, "zero-group"),
    TernaryMatmulCase("outlier", (3,), 32, 256, "outlier"),
    TernaryMatmulCase("tiny-activations", (2,), 32, 256, "tiny"),
    TernaryMatmulCase("subnormal-scales", (2,), 32, 256, "subnormal-scales"),
)
