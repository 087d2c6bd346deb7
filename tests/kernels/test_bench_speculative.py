"""kernels/bench/speculative.py: a tiny run, and that a drafter which changes the text gets no time."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from minicpm_ref.speculative import Tally
from minicpm_ref.speculative import loop as loop_module

BENCH = Path(__file__).parents[2] / "kernels" / "bench"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_speculative", BENCH / "speculative.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(BENCH))
    return module


def test_a_tiny_run_has_every_row(bench: ModuleType) -> None:
    rows = bench.main(["--smoke"])
    assert [row["tokens"] for row in rows if row["kind"] == "verify"] == [1, 2, 4]
    timed = [(row["kind"], row["temperature"], row["drafter"]) for row in rows if row["kind"] != "verify"]
    assert len(timed) == len(set(timed)) == 2 * 2 * 3
    assert all(row["tokens_per_s"] > 0 and row["acceptance_length"] >= 1 for row in rows if row["kind"] != "verify")


def test_a_changed_text_is_not_timed(bench: ModuleType, monkeypatch) -> None:
    walk = loop_module.match_path

    def broken(choose, tokens, parent):
        """Emits the accepted drafts and leaves them out of the cache."""
        found = walk(choose, tokens, parent)
        return type(found)(found.tokens, found.path[:1])

    monkeypatch.setattr(loop_module, "match_path", broken)
    with pytest.raises(RuntimeError, match="changed the text"):
        bench.main(["--smoke"])


def test_tallies_add_up(bench: ModuleType) -> None:
    total, part = Tally(), Tally()
    total.add(3, 1)
    part.add(3, 3)
    part.add(3, 0)
    bench.add(total, part)
    assert total == Tally(rounds=3, drafted=9, emitted=7, reached=[2, 1, 1])
