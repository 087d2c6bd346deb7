"""Ternary inference holds packed weights and nothing else: measured on tensors, and on the memory of the process."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minicpm_ref.cache import KVCache
from minicpm_ref.checkpoint import load, variants
from minicpm_ref.lowbit.layers import TernaryLinear, to_ternary
from minicpm_ref.lowbit.packing import TernaryTensor
from minicpm_ref.lowbit.ternary import dequantize
from minicpm_ref.model import MiniCPM
from minicpm_ref.tour import nbytes

STATUS = Path("/proc/self/status")


class LargestResult(TorchDispatchMode):
    """Bytes of the largest tensor that any torch operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and not func.is_view:
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return result


def ternary_model() -> MiniCPM:
    if "ternary" in variants():
        return load(variant="ternary")[0]
    model = load()[0]
    to_ternary(model)
    return model


def largest_of_a_decode_step(model: MiniCPM) -> int:
    cache = KVCache(model.config, 1, 64)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        model(ids, cache)
        with LargestResult() as largest:
            model(ids[:, :1], cache)
    return largest.nbytes


def test_a_decode_step_makes_no_dense_matrix() -> None:
    model = ternary_model()
    smallest = 2 * min(  # bytes of the smallest matrix in float16
        module.in_features * module.out_features for module in model.modules() if isinstance(module, TernaryLinear)
    )
    assert largest_of_a_decode_step(model) < smallest
    for module in model.modules():  # the planted bug: the watch sees a matrix that is made and thrown away
        if isinstance(module, TernaryLinear):
            module.activations = "float"
    layer = model.get_submodule("model.layers.0.self_attn.o_proj")
    assert isinstance(layer, TernaryLinear)
    layer.forward = lambda x: F.linear(x, dequantize(layer.matrix().codes, layer.matrix().scales))  # type: ignore[method-assign]
    assert largest_of_a_decode_step(model) >= smallest


def test_the_model_takes_what_its_packed_weights_take() -> None:
    base, model = load()[0], ternary_model()
    packed = [module for module in model.modules() if isinstance(module, TernaryLinear)]
    weights = sum(module.in_features * module.out_features for module in packed)
    expected = nbytes(base) - 4 * weights + round(weights * (2 + 16 / 128) / 8)
    assert nbytes(model) == expected
    assert not any(isinstance(module, torch.nn.Linear) for module in model.model.layers.modules())


def peak_growth(action: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process rises at its highest while `action` runs."""

    def read(field: str) -> int:
        found = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
        assert found
        return int(found[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before = read("VmRSS")
    action()
    return read("VmHWM") - before


def product_and_dense_copy() -> tuple[int, int, int]:
    """Peak growth in bytes of three products and of one with a dense copy, and the bytes of a dense float32 matrix."""
    size = 4096
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-1, 2, (size, size), generator=generator, dtype=torch.int8)
    layer = TernaryLinear(TernaryTensor(codes, torch.ones(size, size // 128, dtype=torch.float16), 128))
    x = torch.randn(1, size, generator=generator)
    layer(x)  # whatever is allocated once, such as a compiled kernel
    grown = peak_growth(lambda: [layer(x) for _ in range(3)])
    if layer(x).isnan().any():
        raise AssertionError("the product is not a number")
    return grown, peak_growth(lambda: F.linear(x, codes.float())), 4 * size * size


@pytest.mark.skipif(not STATUS.exists(), reason="reads /proc, which only Linux has")
def test_a_product_needs_no_memory_for_a_dense_matrix() -> None:
    """In a process of its own: memory that an earlier test freed and the allocator kept would hide a dense copy."""
    code = f"import runpy; print(*runpy.run_path({__file__!r})['product_and_dense_copy']())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "PermissionError" in done.stderr:
        pytest.skip("this system does not let a process reset its peak memory")
    assert done.returncode == 0, done.stderr
    product, copy, dense = map(int, done.stdout.split())
    assert product < dense / 8
    assert copy > dense / 2  # the measure sees a dense copy
