"""minicpm_kernels.lowbit.ternary_triton beyond its case rows: the assembly replayed word by word, each kernel behind
the switch, the layouts, and what the wrapper refuses.

Inline assembly does not run in Triton's interpreter. `replay` below executes its text instead, one PTX instruction
after the other in numpy, rounding as the GPU does.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
from minicpm_kernels.lowbit import ternary_triton as kernels  # noqa: E402  # imports triton
from minicpm_kernels.lowbit._ternary_triton_asm import word_products  # noqa: E402
from minicpm_kernels.lowbit.ternary_triton import ternary_matmul  # noqa: E402
from minicpm_kernels.testing import assert_close, check_kernel  # noqa: E402
from minicpm_ref.cases import TERNARY_MATMUL, TernaryMatmulCase  # noqa: E402
from minicpm_ref.lowbit import ternary  # noqa: E402
from minicpm_ref.lowbit.layers import TernaryLinear  # noqa: E402
from minicpm_ref.lowbit.packing import TernaryTensor, from_lanes, scales_from_lanes, scales_to_lanes, to_lanes  # noqa: E402


def halves(words: np.ndarray) -> np.ndarray:
    """uint32 [...] as two float16 [..., 2], in float64, which holds every sum and product of two float16 below."""
    return words[..., None].view(np.float16).astype(np.float64)


def packed(pairs: np.ndarray) -> np.ndarray:
    """The inverse of `halves`: round to float16, half to even, once."""
    return pairs.astype(np.float16).view(np.uint32)[..., 0]


def replay(assembly: str, words: np.ndarray, planes: Iterable[np.ndarray]) -> np.ndarray:
    """Run PTX: $1 = words, $2 .. $9 = planes, uint32 of one shape; returns $0, float32. Unknown instructions raise."""
    registers = {f"${i + 1}": value for i, value in enumerate([words, *planes])}

    def value(name: str) -> np.ndarray:
        return np.full(words.shape, int(name, 0), np.uint32) if name[0].isdigit() else registers[name]

    def product(x: str, y: str) -> np.ndarray:
        return halves(value(x)) * halves(value(y))

    run: dict[str, Callable[..., np.ndarray]] = {
        "and.b32": lambda x, y: value(x) & value(y),
        "shr.u32": lambda x, y: value(x) >> value(y),
        "mul.rn.f16x2": lambda x, y: packed(product(x, y)),
        "fma.rn.f16x2": lambda x, y, z: packed(product(x, y) + halves(value(z))),
        "cvt.f32.f16": lambda x: value(x).astype(np.float32),
        "add.f32": lambda x, y: value(x) + value(y),
    }
    for line in filter(None, (line.strip(" ;{}") if "{l" not in line else line for line in assembly.splitlines())):
        if line.startswith(".reg"):
            continue
        name, rest = line.rstrip(";").split(" ", 1)
        if unpack := re.fullmatch(r"\{(\w+), (\w+)\}, (\w+)", rest):
            lower, upper, source = unpack.groups()
            both = registers[source][..., None].view(np.float16)
            registers[lower], registers[upper] = both[..., 0], both[..., 1]
            continue
        target, *sources = rest.split(", ")
        registers[target] = run[name](*sources)
    return registers["$0"]


def split(case: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(x [tokens, in], words, scales) of a case row's arguments."""
    x, codes, scales = case[:3]
    return x.reshape(-1, x.shape[-1]), codes.view(torch.int32).squeeze(-1), scales


def replay_matvec(x: Tensor, words: Tensor, scales: Tensor, assembly: str) -> Tensor:
    """`_matvec` with its assembly: float32 [tokens, out] from activations that `_planes` prepared."""
    planes, factors, sums = kernels._prepare(x, len(x), True)
    tokens, (blocks, chunks, rows) = len(x), words.shape
    plane = planes.view(torch.int32).numpy().view(np.uint32)  # [tokens, 8, chunks]
    shape = (tokens, blocks, chunks, rows)
    spread = [np.ascontiguousarray(np.broadcast_to(plane[:, i, None, :, None], shape)) for i in range(8)]
    word = np.ascontiguousarray(np.broadcast_to(words.numpy().view(np.uint32), shape))
    products = torch.from_numpy(replay(assembly, word, spread))
    groups = products.reshape(tokens, blocks, chunks // 8, 8, rows).sum(3)  # [tokens, blocks, groups, rows]
    groups = groups * factors.T[:, None, :, None] - sums.T[:, None, :, None]
    return (groups * scales.float()).sum(2).flatten(1)


def one_word(position: int, digit: int) -> np.ndarray:
    """The word whose code at `position` is `digit` and whose other fifteen digits are 0, by way of the packing."""
    codes = torch.full((16, 16), -1, dtype=torch.int8)
    codes[0, position] = digit - 1
    return to_lanes(codes).view(torch.int32).numpy().view(np.uint32)[0, 0, :1, 0]


def planes_of(values: Tensor) -> list[np.ndarray]:
    """The eight plane words of sixteen activations, unscaled but for 2^13 * 4^-(i mod 5)."""
    found = []
    for pair in range(8):
        b, p = divmod(pair, 4)
        two = values[[4 * p + b, 4 * p + 2 + b]] * 2.0**13 / 4 ** (pair % 5)
        found.append(two.half().numpy().view(np.uint32))
    return found


class TestAssembly:
    def test_every_code_in_every_place(self) -> None:
        values = torch.tensor([-8.0, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8]) / 4
        for position in range(16):
            for digit in range(3):
                result = replay(word_products(), one_word(position, digit), planes_of(values))
                assert float(result[0]) * 2**11 == digit * float(values[position])

    def test_sums_of_small_integers_are_exact(self) -> None:
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(-1, 2, (16, 4096), generator=generator, dtype=torch.int8)
        x = torch.randint(-32, 33, (4096,), generator=generator) / 16
        words = to_lanes(codes).view(torch.int32).numpy().view(np.uint32)[0, :, 0, 0]  # row 0 [256]
        planes = [np.concatenate(parts) for parts in zip(*(planes_of(v) for v in x.view(256, 16)), strict=True)]
        expected = ((codes[0] + 1) * x).view(256, 16).sum(1)
        assert np.array_equal(replay(word_products(), words, planes) * 2.0**11, expected.numpy())

    @pytest.mark.parametrize("case", TERNARY_MATMUL, ids=lambda case: case.name)
    def test_rows_in_bfloat16(self, case: TernaryMatmulCase) -> None:
        """bfloat16 numbers, carried in float16: the interpreter that runs `_planes` has no bfloat16."""
        arguments = case.build(torch.float32)
        x, words, scales = split(arguments)
        x = x.bfloat16().half()
        expected = ternary.ternary_matmul(x.double(), *arguments[1:])
        assert_close(replay_matvec(x, words, scales, word_products()).bfloat16(), expected)

    @pytest.mark.parametrize(
        ("right", "wrong"),
        [
            ("0x00300030", "0x00300010"),  # a mask that loses a bit
            ("shr.u32 high, $1, 10", "shr.u32 high, $1, 8"),
            ("bits, $7, sum", "bits, $8, sum"),  # the wrong plane
            ("bits, $5, sum", "bits, $5, bits"),  # a lost sum
            ("right, upper", "right, lower"),
        ],
    )
    def test_broken_assembly_fails(self, right: str, wrong: str) -> None:
        assembly = word_products()
        assert right in assembly
        arguments = TernaryMatmulCase("row", (2,), 32, 256).build(torch.float16)
        x, words, scales = split(arguments)
        expected = ternary.ternary_matmul(x.double(), *arguments[1:])
        assert_close(replay_matvec(x, words, scales, assembly).bfloat16(), expected)
        with pytest.raises(AssertionError, match="mean square"):
            assert_close(replay_matvec(x, words, scales, assembly.replace(right, wrong)).bfloat16(), expected)


class TestLayouts:
    def test_a_word_is_sixteen_columns_of_a_row(self) -> None:
        codes = torch.randint(-1, 2, (48, 256), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
        words = to_lanes(codes).view(torch.int32).squeeze(-1)  # [3, 16, 16]
        row, column = torch.arange(48)[:, None], torch.arange(256)[None, :]
        shift = 8 * (column % 4) + 2 * (column % 16 // 4)
        digits = words[row // 16, column // 16, row % 16] >> shift & 3
        assert torch.equal(digits - 1, codes.int())
        back = torch.zeros(3, 16, 16, dtype=torch.int64)
        back.index_put_((row // 16, column // 16, row % 16), (codes + 1).long() << shift, accumulate=True)
        assert torch.equal(back.to(torch.uint32).view(torch.int32), words)
        assert torch.equal(from_lanes(words.unsqueeze(-1).contiguous().view(torch.uint8)), codes)

    @pytest.mark.parametrize("subnormal", [True, False])
    @pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 1.0), (torch.float16, 1e-4), (torch.float32, 1e-38)])
    def test_planes_hold_the_activations_exactly(self, subnormal: bool, dtype: torch.dtype, size: float) -> None:
        x = (size * torch.randn(3, 256, generator=torch.Generator().manual_seed(2))).to(dtype)
        x[1, :128] = 0
        planes, factors, sums = kernels._prepare(x, 16, subnormal)
        column = torch.arange(256)
        pair, half = column % 2 * 4 + column % 16 // 4, column % 4 // 2
        digit = 4.0 ** (pair % 5) * (2.0**-24 if subnormal else 1)  # what a code of one is read as
        read = planes[:, pair, column // 16 * 2 + half].double() * digit  # [16, 256]
        restored = read * factors.T.double().repeat_interleave(128, dim=1)
        assert torch.equal(restored[:3], x.double())
        assert not planes[3:].any()
        assert_close(sums.T[:3], x.double().view(3, 2, 128).sum(-1))
        assert not sums.T[3:].any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_the_scratch_matrix_is_the_dequantized_one(self, dtype: torch.dtype) -> None:
        _, codes, scales, _ = TernaryMatmulCase("row", (1,), 48, 384).build()
        expected = ternary.dequantize(from_lanes(codes), scales_from_lanes(scales))
        assert torch.equal(kernels._dense(codes.view(torch.int32).squeeze(-1), scales, dtype), expected.to(dtype))


def forced(run: Callable[..., Tensor], subnormal: bool) -> Callable[..., Tensor]:
    """One of the product kernels, whatever the number of tokens would choose."""

    def kernel(x: Tensor, codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
        x, words, scales = split((x, codes, scales))
        return run(x, words, scales, subnormal)

    return kernel


class TestKernels:
    @pytest.mark.parametrize("tokens", [3, 4])
    def test_matvec_takes_up_to_four_tokens(self, tokens: int) -> None:
        case = TernaryMatmulCase("row", (tokens,), 32, 384)
        check_kernel(forced(kernels._run_matvec, False), ternary.ternary_matmul, case.build(torch.float16))

    def test_float16_goes_around_the_assembly(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its sums of eight float16 products would cost as much as the rounding of the result."""
        monkeypatch.setattr(kernels, "_subnormal", lambda: True)
        monkeypatch.setattr(kernels, "_run_matvec", None)
        case = TernaryMatmulCase("row", (1,), 32, 256)
        check_kernel(ternary_matmul, ternary.ternary_matmul, case.build(torch.float16))

    @pytest.mark.parametrize(
        ("tokens", "kind"), [(1, "normal"), (5, "outlier"), (16, "normal"), (17, "normal"), (33, "normal")]
    )
    def test_tl_dot_on_subnormal_codes(self, tokens: int, kind: str) -> None:
        case = TernaryMatmulCase("row", (tokens,), 48, 256, kind)
        check_kernel(forced(kernels._run_matmul, True), ternary.ternary_matmul, case.build(torch.float16))

    def test_tiles_of_rows_and_tokens(self) -> None:
        """More rows than one tile, the last tile ragged, and two tiles of tokens."""
        case = TernaryMatmulCase("row", (65,), 144, 128)
        check_kernel(ternary_matmul, ternary.ternary_matmul, case.build(torch.float16))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_the_scratch_matrix_is_multiplied(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "SCRATCH_TOKENS", 3)
        monkeypatch.setattr(kernels, "_run_matmul", None)
        case = TernaryMatmulCase("row", (3,), 48, 256)
        check_kernel(ternary_matmul, ternary.ternary_matmul, case.build(dtype))

    @pytest.mark.parametrize("tokens", [1, 2])
    def test_matvec_splits(self, tokens: int) -> None:
        """1128 words: nine tiles of 128, the last one ragged, in shares of five and four."""
        assert kernels._shares(1, 9) == (2, 5)
        case = TernaryMatmulCase("row", (tokens,), 16, 16 * 1128)
        check_kernel(ternary_matmul, ternary.ternary_matmul, case.build(torch.float16))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_matmul_splits(self, dtype: torch.dtype) -> None:
        assert kernels._shares(1, 9) == (2, 5)
        case = TernaryMatmulCase("row", (5,), 32, 128 * 9)
        check_kernel(ternary_matmul, ternary.ternary_matmul, case.build(dtype))

    def test_shares_cover_all_steps(self) -> None:
        for programs in (1, 3, 64, 256, 5000):
            for steps in range(1, 70):
                splits, share = kernels._shares(programs, steps)
                assert (splits - 1) * share < steps <= splits * share
                assert splits == 1 or (share >= 4 and splits * programs <= kernels.ENOUGH_PROGRAMS)

    @pytest.mark.parametrize("tokens", [2, 5])
    def test_a_nan_stays_in_its_token(self, tokens: int) -> None:
        x, codes, scales, group = TernaryMatmulCase("row", (tokens,), 32, 256).build(torch.float16)
        x[1, 7] = torch.nan
        expected = ternary.ternary_matmul(x.double(), codes, scales, group)
        assert expected.isnan().any(1).tolist() == [token == 1 for token in range(tokens)]
        assert_close(ternary_matmul(x, codes, scales, group), expected)

    @pytest.mark.parametrize("value", [torch.inf, -torch.inf])
    def test_an_infinity_makes_its_token_nan(self, value: float) -> None:
        x, codes, scales, group = TernaryMatmulCase("row", (5,), 32, 256).build(torch.float16)
        x[1, 7] = value
        for run in (kernels._run_matvec, kernels._run_matmul):
            y = forced(run, False)(x[:4], codes, scales, group)
            assert y.isnan().any(1).tolist() == [False, True, False, False]
            assert y[1].isnan().all()


class TestMutations:
    """What the rows above would miss if they were too easy."""

    @pytest.mark.parametrize("tokens", [1, 5])
    @pytest.mark.parametrize("part", ["planes", "factors", "sums"])
    def test_broken_activations_fail(self, tokens: int, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
        prepare = kernels._prepare

        def broken(x: Tensor, padded: int, subnormal: bool) -> tuple[Tensor, Tensor, Tensor]:
            planes, factors, sums = prepare(x, padded, subnormal)
            if part == "planes":
                planes[:, [0, 1]] = planes[:, [1, 0]]
            if part == "factors":
                factors[1] *= 2
            if part == "sums":
                sums.zero_()
            return planes, factors, sums

        monkeypatch.setattr(kernels, "_prepare", broken)
        with pytest.raises(AssertionError, match="mean square"):
            check_kernel(
                ternary_matmul,
                ternary.ternary_matmul,
                TernaryMatmulCase("row", (tokens,), 32, 256).build(torch.float16),
            )

    def test_a_lost_split_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        add_up = kernels._add_up
        monkeypatch.setattr(kernels, "_add_up", lambda partial, dtype: add_up(partial[:-1].contiguous(), dtype))
        with pytest.raises(AssertionError, match="mean square"):
            check_kernel(
                ternary_matmul,
                ternary.ternary_matmul,
                TernaryMatmulCase("row", (5,), 32, 128 * 9).build(torch.float32),
            )

    def test_exchanged_scales_fail(self) -> None:
        def broken(x: Tensor, codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
            return ternary_matmul(x, codes, scales.flip(2).contiguous(), group_size)

        with pytest.raises(AssertionError, match="mean square"):
            check_kernel(
                broken, ternary.ternary_matmul, TernaryMatmulCase("row", (1,), 32, 256).build(torch.float16)
            )


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_layer_reaches_the_kernel_through_the_backend(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-1, 2, (32, 256), generator=generator, dtype=torch.int8)
    scales = (0.01 + 0.02 * torch.rand(32, 2, generator=generator)).half()
    layer = TernaryLinear(TernaryTensor(codes, scales, 128))
    x = torch.randn(tokens, 256, generator=generator).half()
    monkeypatch.setenv("MINICPM_BACKEND", "triton")
    called = []
    monkeypatch.setattr(kernels, "_prepare", lambda *a, run=kernels._prepare: called.append(a) or run(*a))
    y = layer(x)
    assert len(called) == 1
    monkeypatch.setenv("MINICPM_BACKEND", "torch")
    assert_close(y, layer(x.double()))


X = torch.ones(2, 128)
CODES, SCALES = to_lanes(torch.ones(32, 128, dtype=torch.int8)), scales_to_lanes(torch.ones(32, 1).half())


@pytest.mark.parametrize(
    ("x", "codes", "scales", "group_size", "words"),
    [
        (X, CODES, SCALES, 64, "group_size 64, expected 128"),
        (X.double(), CODES, SCALES, 128, "x is torch.float64, expected torch.float32 or"),
        (X[:, :100].contiguous(), CODES, SCALES, 128, r"x has shape \[2, 100\], expected .*a multiple of 128"),
        (X[:0], CODES, SCALES, 128, r"x has shape \[0, 128\].*not empty"),
        (torch.ones(128, 2).T, CODES, SCALES, 128, "x of shape.* has strides .*x.contiguous"),
        (torch.ones(2, 256), CODES, SCALES, 128, r"codes has shape \[2, 8, 16, 4\], expected \[2, 16, 16, 4\]"),
        (X, CODES.char(), SCALES, 128, "codes is torch.int8, expected torch.uint8"),
        (X, CODES.view(2, 8, 64), SCALES, 128, r"codes has shape \[2, 8, 64\]"),
        (X, CODES[:0], SCALES[:0], 128, r"codes has shape \[0, 8, 16, 4\], expected \[1, 8, 16, 4\]"),
        (X, CODES.mT, SCALES, 128, "codes"),
        (X, CODES, SCALES.float(), 128, "scales is torch.float32, expected torch.float16"),
        (X, CODES, SCALES[:1], 128, r"scales has shape \[1, 1, 16\], expected \[2, 1, 16\]"),
        (X, CODES, SCALES.to("meta"), 128, "scales is on meta, expected cpu"),
        (X, CODES.to("meta"), SCALES, 128, "codes is on meta, expected cpu"),
        (X.bfloat16(), CODES, SCALES, 128, "bfloat16 is wrong in Triton's interpreter"),
    ],
)
def test_arguments_are_checked(x: Tensor, codes: Tensor, scales: Tensor, group_size: int, words: str) -> None:
    with pytest.raises(ValueError, match=f"ternary_matmul: .*{words}"):
        ternary_matmul(x, codes, scales, group_size)


def test_a_gradient_is_refused() -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="ternary_matmul computes no gradient"):
        ternary_matmul(x, CODES, SCALES)


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="the tensors are on cpu, expected a CUDA or ROCm device"):
        ternary_matmul(X, CODES, SCALES)


def test_the_benchmark_refuses_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the benchmark would run")
    script = Path(__file__).parents[3] / "kernels" / "bench" / "ternary_matmul_gpu.py"
    done = subprocess.run([sys.executable, script, "--quick"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("no GPU here")
