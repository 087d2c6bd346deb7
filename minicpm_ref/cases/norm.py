"""Cases of RMSNorm and of its fusion with the residual add.

Both functions reduce over the last axis, so two sizes matter: the width C (a kernel pads it to the next power of two,
hence the rows around 64 and 1024) and the number of rows (a kernel gives several narrow rows to one program, hence
31, 32, 33).
Two rows look after the arithmetic: `tiny-input`, where eps outweighs the mean square, so an eps that is
lost or has the wrong sign shows; and `large-input`, whose squares sum past the largest float16, so a sum that is not
kept in float32 overflows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NormCase:
    """One row: `rms_norm(x, weight, eps)` with x [*shape] of root mean square `scale`, weight [C] around 1."""

    name: str
    shape: tuple[int, ...]
    eps: float = 1e-6
    scale: float = 1.0
    seed: int = 0

    def build(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(x [*shape], weight [C], eps), drawn in float32 on the CPU and then rounded to `dtype`."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.shape, generator=generator) * self.scale
        weight = 1 + 0.3 * torch.randn(self.shape[-1], generator=generator)
        return x.to(device, dtype), weight.to(device, dtype), self.eps


@dataclass(frozen=True)
class AddNormCase(NormCase):
    """One row: `add_rms_norm(residual, branch, weight, eps, scale)`, scale being MiniCPM's scale_depth / sqrt(L)."""

    residual_scale: float = 1.4 / 32**0.5

    def build(  # type: ignore[override]  # more arguments than a plain norm
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, float]:
        """(residual [*shape], branch [*shape], weight [C], eps, residual_scale)."""
        residual, weight, eps = super().build(dtype, device)
        generator = torch.Generator().manual_seed(self.seed + 1)
        branch = torch.randn(self.shape, generator=generator) * self.scale
        return residual, branch.to(device, dtype), weight, eps, self.residual_scale


_ROWS: tuple[tuple[str, tuple[int, ...], float, float], ...] = (
    # name, shape, eps, scale
    ("one-number", (1, 1), 1e-6, 1.0),
    ("length-1", (1, 64), 1e-6, 1.0),
    ("width-block-1", (5, 63), 1e-6, 1.0),
    ("width-block", (5, 64), 1e-6, 1.0),
    ("width-block+1", (5, 65), 1e-6, 1.0),
    ("prime-both", (7, 101), 1e-6, 1.0),
    ("rows-block-1", (31, 64), 1e-6, 1.0),
    ("rows-block", (32, 64), 1e-6, 1.0),
    ("rows-block+1", (33, 64), 1e-6, 1.0),
    ("wide", (3, 1024), 1e-6, 1.0),
    ("wide-ragged", (3, 1025), 1e-5, 1.0),
    ("batch", (2, 3, 256), 1e-5, 1.0),
    ("heads", (2, 5, 4, 64), 1e-6, 1.0),
    ("vector", (96,), 1e-6, 1.0),
    ("tiny-input", (4, 64), 1e-5, 2e-3),
    ("large-input", (4, 64), 1e-6, 300.0),
)

RMS_NORM: tuple[NormCase, ...] = tuple(NormCase(name, shape, eps, scale) for name, shape, eps, scale in _ROWS)

ADD_RMS_NORM: tuple[AddNormCase, ...] = tuple(
    AddNormCase(name, shape, eps, scale) for name, shape, eps, scale in _ROWS
) + (AddNormCase("unscaled", (3, 64), residual_scale=1.0),)
