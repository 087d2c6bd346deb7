"""The choice of an implementation, and that nothing heavy is imported before it is chosen."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from minicpm_ref import backend
from minicpm_ref.lowbit import ternary


@pytest.fixture(autouse=True)
def automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINICPM_BACKEND", raising=False)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend, "_version", lambda package: None)
    backend._explain.cache_clear()
    yield
    backend._explain.cache_clear()


def test_the_cpu_takes_numba_where_there_is_a_kernel() -> None:
    pytest.importorskip("numba")
    choice = backend.explain("ternary_matmul_int8", "cpu")
    assert choice.backend == "numba"
    assert choice.reason.startswith("numba ")
    assert backend.choose("ternary_matmul_int8", torch.device("cpu")) == "numba"
    assert backend.choose("sparse_attention", "cpu") == backend.choose("select_blocks", "cpu") == "numba"
    assert backend.choose("ternary_matmul", "cpu") == "torch"
    assert backend.explain("ternary_matmul", "cpu").reason == "ternary_matmul has no numba implementation"


def test_other_devices_take_torch() -> None:
    assert backend.explain("ternary_matmul_int8", "mps").backend == "torch"
    assert backend.explain("ternary_matmul_int8", "mps").reason == "no kernels for mps devices"


@pytest.mark.usefixtures("nothing_installed")
def test_a_missing_package_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = backend.explain("ternary_matmul_int8", "cpu")
    assert (choice.backend, choice.reason) == ("torch", "numba is not installed")
    monkeypatch.setenv("MINICPM_BACKEND", "numba")
    with pytest.raises(RuntimeError, match="MINICPM_BACKEND=numba: numba is not installed"):
        backend.choose("ternary_matmul_int8", "cpu")


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINICPM_BACKEND", "torch")
    choice = backend.explain("ternary_matmul_int8", "cpu")
    assert (choice.backend, choice.reason) == ("torch", "MINICPM_BACKEND=torch")
    monkeypatch.setenv("MINICPM_BACKEND", "fortran")
    with pytest.raises(ValueError, match="MINICPM_BACKEND=fortran: expected one of auto, torch, triton, numba"):
        backend.choose("ternary_matmul_int8", "cpu")


def test_a_distribution_of_another_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton for ROCm and for Windows imports as `triton` and is installed under another name."""
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backend.importlib.metadata, "packages_distributions", lambda: {"triton": ["triton-rocm"]})
    monkeypatch.setattr(backend.importlib.metadata, "version", {"triton-rocm": "3.9"}.__getitem__)
    assert backend._version("triton") == "3.9"
    assert backend._version("numba") == "of unknown version"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="operation 'attention': expected one of"):
        backend.choose("attention", "cpu")
    with pytest.raises(ValueError, match="ternary_matmul_int8 has no opencl implementation, only torch, numba"):
        backend.kernel("ternary_matmul_int8", "opencl")


def test_kernels_are_found() -> None:
    assert backend.kernel("ternary_matmul", "torch") is ternary.ternary_matmul
    pytest.importorskip("numba")
    from minicpm_kernels.lowbit import ternary_cpu

    assert backend.kernel("ternary_matmul_int8", "numba") is ternary_cpu.ternary_matmul_int8


def test_describe_names_the_instruction_set() -> None:
    pytest.importorskip("numba")
    from minicpm_kernels.lowbit.ternary_cpu import INSTRUCTION_SET

    rows = {(row.operation, row.device): row for row in backend.describe()}
    assert f", {INSTRUCTION_SET};" in rows["ternary_matmul_int8", "cpu"].reason
    assert rows["ternary_matmul_int8", "cpu"].reason.endswith(
        "; the reference takes gradients, float64, group sizes other than 128"
    )
    assert rows["select_blocks", "cpu"].reason.endswith("; the reference takes float64")
    assert {operation for operation, _ in rows} == set(backend.OPERATIONS)


def test_choosing_imports_no_compiler() -> None:
    code = (
        "import sys, minicpm_ref, minicpm_ref.lowbit.layers as t, minicpm_ref.backend as b;"
        "b.choose('ternary_matmul_int8', 'cpu');"
        "print(sorted(name for name in ('numba', 'triton') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_call_that_a_kernel_cannot_take_goes_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    x, parameter = torch.ones(2), torch.ones(2, requires_grad=True)
    assert backend.choose_for("sparse_attention", x, x) == "numba"
    assert backend.choose_for("sparse_attention", x, parameter) == "torch"
    assert backend.choose_for("sparse_attention", x.double()) == "torch"
    assert backend.choose_for("sparse_attention", x, obstacle="heads of 7") == "torch"
    with torch.no_grad():
        assert backend.choose_for("sparse_attention", x, parameter) == "numba"
    # asked for by name it must run, or say why not
    monkeypatch.setenv("MINICPM_BACKEND", "numba")
    assert backend.choose_for("sparse_attention", x) == "numba"
    for tensors, obstacle, reason in (
        ((x, parameter), "", "a gradient: call the model under torch.no_grad"),
        ((x.double(),), "", "float64"),
        ((x,), "heads of 7", "heads of 7"),
    ):
        with pytest.raises(RuntimeError, match=f"MINICPM_BACKEND=numba.*sparse_attention does not do {reason}"):
            backend.choose_for("sparse_attention", *tensors, obstacle=obstacle)
    assert backend.choose_for("ternary_matmul", parameter) == "torch"  # no such kernel: `info` says so
