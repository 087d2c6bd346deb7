"""The CPU benchmark of sparse attention runs from one command, and its results say what they were made with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("numba", reason="numba is not installed")
from minicpm_ref.plotting import load_results  # noqa: E402

BENCH = Path(__file__).parents[2] / "kernels" / "bench"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "sparse_attention_cpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_quick_run_and_its_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("--quick", "--threads", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = load_results("sparse_attention_cpu", tmp_path)
    rows = results["rows"]
    assert [row["phase"] for row in rows if row["kind"] == "crossover"] == ["decode", "prefill"]
    measured = [row for row in rows if row["kind"] in ("decode", "prefill")]
    names = {kind: {row["implementation"] for row in measured if row["kind"] == kind} for kind in ("decode", "prefill")}
    assert names["decode"] == {"sparse", "sparse_all_blocks", "sdpa_gqa", "sdpa_folded"}
    assert names["prefill"] == {"sparse", "sdpa_gqa", "sdpa_repeat"}
    assert all(row["calls"] >= 3 for row in measured)
    for row in measured:  # ratios are of medians, to the fastest dense peer
        same = [r for r in measured if (r["kind"], r["tokens"]) == (row["kind"], row["tokens"])]
        best = min(r["median_ms"] for r in same if r["implementation"].startswith("sdpa"))
        assert row["faster_than_dense"] == pytest.approx(best / row["median_ms"])
    assert all(0 < row["min_ms"] <= row["median_ms"] and row["share_of_floor"] > 0 for row in measured)
    assert all(0 < row["share_of_stage_1"] < 1 for row in measured if row["implementation"] == "sparse")
    assert 0 <= results["settings"]["largest_error"] < 1e-4
    monkeypatch.syspath_prepend(BENCH.parents[1] / "figures")
    import draw

    draw.draw(["sparse_attention_cpu"], tmp_path, tmp_path)
    assert (tmp_path / "sparse_attention_cpu.svg").stat().st_size > 1000


@pytest.mark.slow
def test_quick_numbers_are_not_kept() -> None:
    done = run("--quick")
    assert done.returncode != 0
    assert "name another folder" in done.stderr


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    import sparse_attention_cpu

    return sparse_attention_cpu


@pytest.mark.parametrize("peer", ["sdpa", "sdpa_folded", "all_blocks"])
def test_a_wrong_peer_is_not_timed(bench: ModuleType, peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each dense peer is judged against float64, not against another peer."""
    bench.judge(bench.QUICK, 203)
    original = getattr(bench, peer)
    monkeypatch.setattr(bench, peer, lambda *arguments: 1.0001 * original(*arguments))
    with pytest.raises(AssertionError, match="error relative"):
        bench.judge(bench.QUICK, 203)


def test_no_median_rests_on_one_call(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PAUSE", 0)
    calls: list[str] = []
    candidates = {name: lambda _, name=name: calls.append(name) for name in "ab"}
    samples = bench.take_turns(candidates, seconds=0, most=100, burst=1)
    assert {name: len(found) for name, found in samples.items()} == {"a": 3, "b": 3}
    assert calls == ["a", "a", "b", "b", "b", "a", "a", "b"]  # each one's first is thrown away; who begins changes


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [((2.0, 3.0, 4.0), 1000), ((0.5, 0.9, 1.0), None), ((0.5, 2.0, 3.0), 2000), ((2.0, 0.5, 2.0), 8000)],
)
def test_crossover(bench: ModuleType, ratios: tuple[float, ...], expected: float | None) -> None:
    lengths = (1000, 4000, 16000)
    rows = [
        {"implementation": "sparse", "tokens": tokens, "faster_than_dense": ratio}
        for tokens, ratio in zip(lengths, ratios, strict=True)
    ]
    assert bench.crossover(rows, "decode")["tokens"] == (None if expected is None else pytest.approx(expected))


def test_the_work_that_is_counted(bench: ModuleType) -> None:
    """Against lists: 75 tokens, blocks of 16, 6 of them visible at most."""
    from minicpm_ref.cases.sparse import SMALL
    from minicpm_ref.sparse import select_blocks

    q, k, _ = bench.draw(150, 150)
    lists = select_blocks(q, k, SMALL)[0, 0]
    keys = sum(min(16, position + 1 - 16 * int(block)) for position, row in enumerate(lists) for block in row[row >= 0])
    assert bench.visible(SMALL, 150)[0] == keys
