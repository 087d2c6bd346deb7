"""minicpm_kernels.lowbit.ternary_triton_int8 beyond its case rows: activations rounded as in the reference to the last
bit, integer sums that are exact, each kernel by itself, and who reaches it.

`test_reference.py` runs the public function within the bound of a float32 sum, because groups are added in another
order. Here the bound is zero: without splits `_matmul` adds them as the reference does, and with whole numbers for
scales no sum rounds.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
from minicpm_kernels import aot  # noqa: E402
from minicpm_kernels.lowbit import ternary_triton_int8 as kernels  # noqa: E402  # imports triton
from minicpm_kernels.lowbit.ternary_triton_int8 import ternary_matmul_int8  # noqa: E402
from minicpm_kernels.testing import assert_close, check_kernel, poisoned_memory  # noqa: E402
from minicpm_ref import backend
from minicpm_ref.cases import TernaryMatmulCase  # noqa: E402
from minicpm_ref.lowbit import ternary  # noqa: E402
from minicpm_ref.lowbit.layers import TernaryLinear  # noqa: E402
from minicpm_ref.lowbit.packing import TernaryTensor  # noqa: E402

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def forced(run: Run) -> Callable[..., Tensor]:
    """One of the product kernels, whatever the number of tokens would choose."""

    def kernel(x: Tensor, codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
        with poisoned_memory():
            return run(x, codes.view(torch.int32).squeeze(-1), scales)

    return kernel


def whole_numbers(tokens: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """A row whose activations are int8 already and whose scales are 1: float32 holds every sum exactly."""
    x, codes, scales, group_size = TernaryMatmulCase("whole", (tokens,), rows, columns).build()
    x = torch.randint(-127, 128, x.shape, generator=torch.Generator().manual_seed(1)).float()
    x[:, ::group_size] = 127
    return x, codes, torch.ones_like(scales), group_size


@pytest.mark.parametrize("tokens", [5, 17])
def test_matmul_returns_the_reference_bits(tokens: int) -> None:
    arguments = TernaryMatmulCase("row", (tokens,), 144, 384).build()
    assert torch.equal(forced(kernels._run_matmul)(*arguments), ternary.ternary_matmul_int8(*arguments))


@pytest.mark.parametrize(("run", "tokens"), [("_run_matvec", 1), ("_run_matvec", 3), ("_run_matmul", 3)])
def test_splits_and_ragged_steps_lose_nothing(run: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """17 groups: nine steps of two for `_matvec`, the last one ragged, in shares of five and four."""
    monkeypatch.setattr(kernels, "GROUPS", 2)
    assert kernels._shares(1, 9) == (2, 5)
    arguments = whole_numbers(tokens, 16, 17 * 128)
    y = forced(getattr(kernels, run))(*arguments)
    assert torch.equal(y, ternary.ternary_matmul_int8(*arguments))
    assert torch.equal(y, ternary.ternary_matmul(*arguments))


@pytest.mark.parametrize("tokens", [3, 4])
def test_matvec_takes_up_to_four_tokens(tokens: int) -> None:
    case = TernaryMatmulCase("row", (tokens,), 32, 384)
    check_kernel(forced(kernels._run_matvec), ternary.ternary_matmul_int8, case.build(torch.float16))


def test_activations_are_rounded_as_in_the_reference() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, 256, generator=generator)
    x[1] = torch.arange(256) - 127.5  # many quotients next to one half
    x[2] = torch.randint(-254, 255, (256,), generator=generator) / 2
    x[2, ::128] = 127  # quotients that are exactly one half
    x[3] = 0
    x[4] *= 1e-38
    x[5, 130], x[6, 7], x[7, 8] = torch.nan, torch.inf, -torch.inf
    x[8] *= 2e37
    with poisoned_memory():
        q, scales, sums = kernels._prepare(x, 16)
    expected, expected_scales = ternary.quantize_activations(x)
    by_pair = expected.view(9, 2, 8, 4, 4).transpose(2, 3).reshape(9, 256)
    assert torch.equal(q[:9], by_pair)
    assert torch.equal(scales.T[:9].nan_to_num(-1), expected_scales.nan_to_num(-1))
    assert torch.equal(sums.T[:9], expected.sum(-1, dtype=torch.int32))
    assert not any(part.any() for part in (q[9:], scales[:, 9:], sums[:, 9:]))


@pytest.mark.parametrize("run", ["_run_matvec", "_run_matmul"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_poisons_itself_alone(run: str, value: float) -> None:
    x, *rest = TernaryMatmulCase("row", (3,), 32, 256).build()
    clean = forced(getattr(kernels, run))(x, *rest)
    x[1, 7] = value
    y = forced(getattr(kernels, run))(x, *rest)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("part", ["bit pairs", "scales", "sums"])
def test_broken_activations_fail(tokens: int, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = kernels._prepare

    def broken(x: Tensor, padded: int) -> tuple[Tensor, Tensor, Tensor]:
        q, scales, sums = prepare(x, padded)
        if part == "bit pairs":
            q = q.view(padded, -1, 4, 32).flip(2).reshape(padded, -1)
        return q, scales.flip(0) if part == "scales" else scales, sums * (part != "sums")

    monkeypatch.setattr(kernels, "_prepare", broken)
    with pytest.raises(AssertionError, match="mean square"):
        check_kernel(
            ternary_matmul_int8,
            ternary.ternary_matmul_int8,
            TernaryMatmulCase("row", (tokens,), 32, 256).build(torch.float16),
        )


@pytest.mark.parametrize("tokens", [1, 5])
def test_only_a_layer_that_asks_reaches_it(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-1, 2, (32, 256), generator=generator, dtype=torch.int8)
    matrix = TernaryTensor(codes, (0.01 + 0.02 * torch.rand(32, 2, generator=generator)).half(), 128)
    x = torch.randn(tokens, 256, generator=generator)
    called = []
    monkeypatch.setattr(kernels, "_prepare", lambda *a, run=kernels._prepare: called.append(a) or run(*a))
    monkeypatch.setenv("MINICPM_BACKEND", "triton")
    floats = TernaryLinear(matrix)(x)
    assert not called
    rounded = TernaryLinear(matrix, activations="int8")(x)
    assert len(called) == 1
    assert 0.001 < (rounded - floats).norm() / floats.norm() < 0.012  # as on the CPU: 0.6 % on normal data
    monkeypatch.setenv("MINICPM_BACKEND", "torch")
    assert_close(rounded, TernaryLinear(matrix, activations="int8")(x.double()))


def test_a_gpu_multiplies_floats_and_a_cpu_integers_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINICPM_BACKEND", raising=False)
    pytest.importorskip("numba")
    assert backend.choose("ternary_matmul_int8", "cpu") == "numba"
    assert backend.choose("ternary_matmul_int8", "cuda") == backend.choose("ternary_matmul", "cuda") == "triton"
    assert backend.kernel("ternary_matmul_int8", "triton") is ternary_matmul_int8


X, CODES, SCALES, _ = TernaryMatmulCase("row", (2,), 32, 128).build()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((X, CODES, SCALES, 64), "group_size 64, expected 128"),
        ((X.double(), CODES, SCALES), "x is torch.float64, expected torch.float32 or"),
        ((X[:0], CODES, SCALES), r"x has shape \[0, 128\].*not empty"),
        ((X, CODES.char(), SCALES), "codes is torch.int8, expected torch.uint8"),
        ((X, CODES, SCALES[:1]), r"scales has shape \[1, 1, 16\], expected \[2, 1, 16\]"),
        ((X, CODES, SCALES.to("meta")), "scales is on meta, expected cpu"),
        ((X.bfloat16(), CODES, SCALES), "bfloat16 is wrong in Triton's interpreter"),
    ],
)
def test_arguments_are_checked(arguments, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=f"ternary_matmul_int8: .*{words}"):
        ternary_matmul_int8(*arguments)


def test_a_gradient_is_refused() -> None:
    with pytest.raises(RuntimeError, match="ternary_matmul_int8 computes no gradient"):
        ternary_matmul_int8(X.clone().requires_grad_(), CODES, SCALES)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("label", "target", "instruction"),
    [("M2-assembly", "sm_80", "dp4a.u32.s32"), ("M16", "sm_80", "s8.s8.s32"), ("M16", "sm_90", "s32.s8.s8")],
)
def test_the_instructions_for_bytes_are_used(label: str, target: str, instruction: str) -> None:
    config = next(config for config in aot.configs("ternary_matmul_int8") if config.label == label)
    assert instruction in aot.compile_config(config, aot.TARGETS[target]).assembly
