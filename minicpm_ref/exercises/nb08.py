"""Checkers of 08_ternary_weights: the size of a checkpoint, base-3 digits without division, and the best scales."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minicpm_ref.config import ModelConfig
from minicpm_ref.exercises import Operations, attempt
from minicpm_ref.lowbit.packing import pack

DIVISIONS = ("div", "floor_divide", "remainder", "fmod")
TABLES = ("index", "index_select", "gather", "take", "embedding")


def check_checkpoint_bytes(checkpoint_bytes: Callable[[ModelConfig, float, int], float]) -> str:
    """Check `checkpoint_bytes(config, code_bits, group_size)`: bytes of the tensors of a ternary checkpoint."""

    def check() -> None:
        for preset in ("minicpm4.1-8b", "embedded"):
            config = ModelConfig.preset(preset)
            packed = config.num_hidden_layers * sum(r * c for r, c in config.linear_shapes().values())
            for bits, group_size in ((2.0, 128), (1.6, 128), (2.0, 64)):
                other = 2 * (config.num_parameters() - packed)
                expected = packed * bits / 8 + packed / group_size * 2 + other
                found = checkpoint_bytes(config, bits, group_size)
                where = f"{preset}, {bits} bits, groups of {group_size}"
                assert not math.isclose(found, expected - packed / group_size * 2, rel_tol=1e-6), (
                    f"{where}: every group has a scale of two bytes"
                )
                assert not math.isclose(found, expected - other, rel_tol=1e-6), (
                    f"{where}: embeddings, norms and the output matrix are in the file, too, in float16"
                )
                assert math.isclose(found, expected, rel_tol=1e-6), f"{where}: expected {expected:.0f}, got {found:.0f}"

    return attempt("checkpoint_bytes", check)


def check_unpack_trits(unpack_trits: Callable[[Tensor, int], Tensor]) -> str:
    """Check `unpack_trits(packed, count)`: int8 codes [count] of base-3 bytes, without division, remainder or table."""

    def check() -> None:
        generator = torch.Generator().manual_seed(0)
        for count in (5, 1, 7, 640):
            codes = torch.randint(-1, 2, (1, count), generator=generator, dtype=torch.int8)
            with Operations() as used:
                found = unpack_trits(pack(codes, "base3"), count)
            assert found.dtype == torch.int8, f"expected int8 codes, got {found.dtype}"
            assert tuple(found.shape) == (count,), f"{count} codes: expected shape [{count}], got {list(found.shape)}"
            wrong = (found != codes[0]).nonzero().flatten().tolist()
            assert not wrong, f"{count} codes: number {wrong[0]} differs, of byte {wrong[0] // 5}"
        every = torch.arange(243, dtype=torch.uint8)
        back = pack(unpack_trits(every.clone(), 5 * 243)[None], "base3")
        wrong = (back != every).nonzero().flatten().tolist()
        assert not wrong, f"byte {wrong[0]} becomes byte {int(back[wrong[0]])}: overflow, or a small k?"
        assert not used.names & set(DIVISIONS), f"this divides: {sorted(used.names & set(DIVISIONS))}"
        assert not used.names & set(TABLES), f"this looks up a table: {sorted(used.names & set(TABLES))}"

    return attempt("unpack_trits", check)


def check_best_scales(best_scales: Callable[[Tensor, int], Tensor]) -> str:
    """Check `best_scales(w, group_size)`: scales [out, in / g] with the smallest squared error of a ternary grid."""

    def check() -> None:
        generator = torch.Generator().manual_seed(0)
        normal = torch.randn(3, 64, generator=generator)
        lone = normal.clone()
        lone[:, 5] = 40.0
        for name, w, group_size in (
            ("normal weights", normal, 32),
            ("heavy tails", normal**3, 64),
            ("one weight far out", lone, 16),
        ):
            found = best_scales(w.clone(), group_size)
            groups = w.view(len(w), -1, group_size).abs()
            assert found.shape == groups.shape[:2], f"{name}: expected shape {list(groups.shape[:2])}"
            top = groups.sort(-1, descending=True).values.cumsum(-1)  # sums of the k largest
            candidates = top / torch.arange(1, group_size + 1)
            smallest = torch.stack([_squared_error(groups, s) for s in candidates.unbind(-1)]).amin(0)
            error = _squared_error(groups, found)
            ratio = (error / smallest).max().item()
            assert not torch.allclose(found, groups.mean(-1)), f"{name}: the mean is not the best scale"
            assert ratio < 1.0001, f"{name}: one group's error is {ratio:.3g} times the smallest possible"
        zeros = best_scales(torch.zeros(1, 8), 8)
        assert bool(zeros.isfinite().all()), f"a group of zeros: expected a finite scale, got {zeros.tolist()}"

    return attempt("best_scales", check)


def _squared_error(groups: Tensor, scales: Tensor) -> Tensor:
    """Of |w| in groups [..., g] on the grid of their scales [...], each at the nearer of its two levels."""
    return torch.minimum(groups, (groups - scales.unsqueeze(-1)).abs()).square().sum(-1)
