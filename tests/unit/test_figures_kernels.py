"""The charts of the kernels, drawn from rows as the benchmarks build them, with times that a formula made up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from minicpm_ref.plotting import styled

ROOT = Path(__file__).parents[2]
CIRCUMSTANCES: dict[str, Any] = {
    "device": {"name": "a machine"},
    "versions": {"torch": "2.13.0"},
    "settings": {"rounds": 3},
    "date": "2026-01-02T03:04:05+00:00",
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256)


@pytest.fixture
def charts(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.syspath_prepend(ROOT / "figures")
    import charts_kernels

    with styled():
        yield charts_kernels


def texts(figure: Any) -> list[str]:
    """Titles, legend entries, names of bars and notes of all panels."""
    found = []
    for ax in figure.axes:
        entries = ax.get_legend().get_texts() if ax.get_legend() else []
        found += [ax.get_title(loc="left"), *(t.get_text() for t in [*entries, *ax.get_yticklabels(), *ax.texts])]
    return found


def cpu_results(implementations: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """`ternary_matmul.main`'s rows; implementation -> (bits a weight, GMAC/s of one thread)."""
    rows: list[dict[str, Any]] = [
        {"kind": "read_limit", "threads": threads, "bytes": 1 << 28, "min_us": (1 << 28) / speed / 1e3}
        for threads, speed in ((1, 11.0), (2, 19.0))
    ]
    rows.append({"kind": "vnni_peak", "threads": 1, "macs": 1 << 32, "min_us": (1 << 32) / 250 / 1e3})
    for shape, out, columns in (("4096x4096", 4096, 4096), ("16384x4096", 16384, 4096)):
        for tokens in TOKENS:
            for threads in (1, 2) if tokens <= 4 else (1,):
                for name, (bits, peak) in implementations.items():
                    size = out * columns * bits / 8
                    times = size / (10 * threads**0.8) / 1e3, out * columns * tokens / (peak * threads) / 1e3
                    rows.append(
                        {"kind": "product", "implementation": name, "shape": shape, "out": out, "in": columns}
                        | {"tokens": tokens, "threads": threads, "weight_bytes": size, "median_us": max(times)}
                    )
    return CIRCUMSTANCES | {"rows": rows}


CPU = {"ternary_int8": (2.125, 180.0), "torch_float32": (32, 40.0), "torch_bfloat16": (16, 15.0)}
GGML = {"TQ2_0": (2.0625, 25.0), "TQ1_0": (1.6875, 15.0), "Q4_0": (4.5, 16.0)}


def test_the_cpu_product(charts: ModuleType) -> None:
    found = texts(charts.ternary_matmul(cpu_results(CPU | GGML)))
    assert {"one token", "this project", "ggml TQ2_0", "torch float32", "peak of the instruction"} <= set(found)


def test_the_cpu_product_without_ggml(charts: ModuleType) -> None:
    found = texts(charts.ternary_matmul(cpu_results(CPU)))
    assert "this project" in found
    assert not any("ggml" in text for text in found)


def gpu_results(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`ternary_matmul_gpu.main`'s rows."""
    monkeypatch.syspath_prepend(ROOT / "kernels" / "bench")
    from ternary_matmul_gpu import product_row

    rows: list[dict[str, Any]] = [{"implementation": "copy", "bytes": 2**31, "median_us": 2**31 / 4.2e6}]
    for out, columns in ((4096, 4096), (16384, 4096), (4096, 16384), (1024, 512)):
        for tokens in TOKENS:
            for name, bits, peak in (("torch_bfloat16", 16, 700e6), ("ternary", 2.125, 300e6), ("int8", 2.125, 600e6)):
                read = int(out * columns * bits / 8)
                time = max(1.5 + read / 3.6e6, 2 * out * columns * tokens / peak)
                rows.append(product_row(name, tokens, out, columns, read, {"median_us": time}))
    return CIRCUMSTANCES | {"rows": rows}


def test_the_gpu_product(charts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = texts(charts.ternary_matmul_gpu(gpu_results(monkeypatch)))
    assert {"times as fast as bfloat16", "ternary, int8 activations", "int8, 16384 x 4096"} <= set(found)


def sparse_results(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`sparse_attention.main`'s rows, by the function that builds them there."""
    pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
    monkeypatch.syspath_prepend(ROOT / "kernels" / "bench")
    from sparse_attention import finish

    rows: list[dict[str, Any]] = [{"function": "calibration", "matmul_tflops": 700.0, "copy_gb_per_s": 4200.0}]
    for tokens in (8192, 16384, 32768, 65536, 131072):
        seconds = {"union": 1e-6 * tokens * 0.6, "token": 2e-6 * tokens, "sdpa-flash": 2e-11 * tokens**2}
        seconds |= {"flex": 5e-6 * tokens} if tokens <= 32768 else {}
        for i, function in enumerate(("forward", "forward+backward", "end to end", "decode")):
            times: dict[str, dict[str, Any]] = {name: {"median_us": 1e6 * value} for name, value in seconds.items()}
            times["union"]["median_us"] *= 1 + i / 4
            if function == "decode":
                times = {"sparse": {"median_us": 20 + tokens / 4e3}, "sdpa-flash": {"median_us": 20 + tokens / 2e3}}
            times |= {"sdpa-cudnn": {"refused": "no such shape"}}
            group = {"function": function, "tokens": tokens, "batch": 1, "blocks": 96}
            group |= {} if function == "decode" else {"lists": "selected"}
            flops, moved = 0.0 if function == "decode" else 2e8 * tokens, 1e3 * tokens
            rows += finish(group, times, dict.fromkeys(times, flops), dict.fromkeys(times, moved), (7e14, 4.2e12))
    return CIRCUMSTANCES | {"rows": rows}


def test_sparse_attention(charts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = texts(charts.sparse_attention(sparse_results(monkeypatch)))
    assert {"times as fast as", "% of the floor", "dense, decode", "FlexAttention, forward"} <= set(found)
