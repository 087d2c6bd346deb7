"""The CPU benchmark of the ternary product runs from one command, and its results say what they were made with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minicpm_ref.plotting import load_results

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "kernels" / "bench" / "ternary_matmul.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCH), *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("--quick", "--threads", "1", "--rounds", "1", "--burst", "0", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = load_results("ternary_matmul_cpu", tmp_path)
    assert {row["kind"] for row in results["rows"]} >= {"read_limit", "product"}
    products = [row for row in results["rows"] if row["kind"] == "product"]
    assert {row["implementation"] for row in products} >= {"ternary_int8", "torch_float32", "torch_bfloat16"}
    assert all(0 <= row["error"] < 0.2 and row["min_us"] > 0 for row in products)
    packed = next(row for row in products if row["implementation"] == "ternary_int8")
    assert packed["weight_bytes"] == packed["out"] * packed["in"] * 2.125 / 8
    assert results["settings"]["instruction_set"]
    assert "ggml" in results["settings"]

    monkeypatch.syspath_prepend(ROOT / "figures")
    import draw

    draw.draw(["ternary_matmul"], tmp_path, tmp_path)
    assert (tmp_path / "ternary_matmul.png").exists()


@pytest.mark.slow
def test_quick_numbers_are_not_kept() -> None:
    done = run("--quick")
    assert done.returncode != 0
    assert "name another folder" in done.stderr


@pytest.mark.parametrize("name", ["ternary_int8", "torch_float32", "torch_bfloat16"])
def test_a_wrong_candidate_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH.parent)
    import ternary_matmul as bench

    problem = bench.Problem(64, 512, None, 1 << 18)
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    candidates = problem.candidates(x, 1)
    errors = bench.check(candidates, x, problem.dense)
    assert set(errors) == set(candidates)
    right = candidates[name].output
    candidates[name].output = lambda: right() * (1 + 2 * bench.ACCEPTED[name])
    with pytest.raises(RuntimeError, match=f"{name}: relative error .*, accepted"):
        bench.check(candidates, x, problem.dense)
