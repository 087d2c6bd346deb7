"""Every Triton kernel compiles ahead of time for every target, fits its shared memory, and keeps its values in
registers.

No GPU is needed. These tests run in their own process, without Triton's interpreter: `make test-aot`.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from typing import Any

import pytest

from minicpm_kernels.registry import KERNELS, CompileConfig, Kernel

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
from minicpm_kernels import aot  # noqa: E402  # imports triton

TRITON_KERNELS = [kernel for kernel in KERNELS if kernel.language == "triton"]


def builds() -> list[Any]:
    """One parameter set for every kernel, configuration and target."""
    return [
        pytest.param(config, target, id=f"{kernel.name}-{config.label}-{target}")
        for kernel in TRITON_KERNELS
        for config in aot.configs(kernel.name)
        for target in config.targets
    ]


@pytest.mark.aot
@pytest.mark.parametrize(("config", "target"), builds())
def test_compiles(config: CompileConfig, target: str) -> None:
    report = aot.compile_config(config, aot.TARGETS[target])
    limit = aot.TARGETS[target].shared_limit
    assert report.shared <= limit, f"{report.shared} bytes of shared memory, {target} has {limit}"
    assert report.spills <= config.spills, f"{report.spills} spills, {config.spills} accepted"


@pytest.mark.parametrize("kernel", TRITON_KERNELS, ids=lambda kernel: kernel.name)
def test_configurations_cover_the_kernel(kernel: Kernel) -> None:
    """bfloat16 is the dtype of the published models; the labels become test ids, so they are unique."""
    configs = aot.configs(kernel.name)
    assert any("*bf16" in config.signature.values() for config in configs)
    labels = [(config.function, config.label) for config in configs]
    assert len(labels) == len(set(labels))


@pytest.mark.parametrize("module", sorted({module for k in TRITON_KERNELS for module in (k.module, *k.parts)}))
def test_every_jitted_function_is_compiled(module: str) -> None:
    """A jitted function that no configuration launches would only be interpreted. Functions that others call need
    none."""
    loaded = importlib.import_module(module)
    tree = ast.parse(inspect.getsource(loaded))
    jitted = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(part) for part in node.decorator_list)
    }
    called = {
        child.func.id
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name in jitted
        for child in ast.walk(node)
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Name)
    }
    compiled = {config.function for config in loaded.COMPILE_CONFIGS}
    assert jitted - called <= compiled <= jitted


@pytest.mark.aot
class TestTheCompileTests:
    """What the tests above look for can be found."""

    def test_spills_are_counted(self) -> None:
        """One warp for a row of 16384 numbers leaves 512 numbers to a thread, and a thread has 255 registers."""
        config = next(c for c in aot.configs("rms_norm") if c.label == "C16384-fp32")
        crowded = dataclasses.replace(config, num_warps=1)
        assert aot.compile_config(crowded, aot.TARGETS["sm_90"]).spills > 0
        assert aot.compile_config(crowded, aot.TARGETS["gfx942"]).spills > 0

    def test_an_unknown_kernel_is_named(self) -> None:
        with pytest.raises(ValueError, match="no kernel is called 'rms'.*rms_norm"):
            aot.configs("rms")


def test_interpreting_process_refuses_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="process without"):
        aot.compile_config(aot.configs("rms_norm")[0], aot.TARGETS["sm_90"])
