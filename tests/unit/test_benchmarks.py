"""kernels/bench/common.py: what is recorded, in which order candidates run, and that a wrong candidate is not
timed."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from minicpm_ref.plotting import load_results

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def common() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_common", ROOT / "kernels" / "bench" / "common.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Clock:
    """Stands in for the timer: notes who was called, and returns 1, 2, 3, ... seconds."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, function: Callable[..., Any], buffers: Sequence[tuple[Any, ...]], device: str) -> float:
        self.calls.append(function.__name__)
        return float(len(self.calls))


def first(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def second(x: torch.Tensor) -> torch.Tensor:
    return 1 + x


def test_results_are_complete_and_written_whole(common: ModuleType, tmp_path: Path) -> None:
    path = common.write_results("run", "cpu", {"rounds": 3}, [{"a": 1.5}], tmp_path)
    results = load_results("run", tmp_path)
    assert set(results) == {"name", "date", "device", "versions", "settings", "git_commit", "command", "rows"}
    assert results["versions"]["torch"] == torch.__version__
    assert results["device"]["cores"] >= 1
    assert results["rows"] == [{"a": 1.5}]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert str(Path.home()) not in path.read_text()


def test_a_failed_write_leaves_the_old_file(common: ModuleType, tmp_path: Path) -> None:
    path = common.write_results("run", "cpu", {"rounds": 3}, [{"a": 1.5}], tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        common.write_results("run", "cpu", {"rounds": 3}, [{"a": math.nan}], tmp_path)
    with pytest.raises(ValueError, match="has no rows"):
        common.write_results("run", "cpu", {"rounds": 3}, [], tmp_path)
    assert path.read_bytes() == before
    assert json.loads(before)["name"] == "run"
    assert len(list(tmp_path.iterdir())) == 1


def test_candidates_take_turns(common: ModuleType) -> None:
    clock = Clock()
    times = common.measure({"one": first, "two": second}, first, (torch.ones(4),), "cpu", rounds=3, clock=clock)
    warm_up, rounds = clock.calls[:2], clock.calls[2:]
    assert warm_up == ["first", "second"]
    assert rounds == ["first", "second", "second", "first", "first", "second"]
    assert times["one"]["median_us"] == 6e6  # the seconds 3, 6, 7
    assert times["two"]["median_us"] == 5e6  # the seconds 4, 5, 8


def test_a_wrong_candidate_is_not_timed(common: ModuleType) -> None:
    clock = Clock()
    wrong = {"right": first, "wrong": lambda x: x - 1}
    with pytest.raises(AssertionError, match="wrong: error relative"):
        common.measure(wrong, first, (torch.ones(4),), "cpu", clock=clock)
    assert clock.calls == []


def test_buffers_rotate_beyond_the_cache(common: ModuleType) -> None:
    x = torch.zeros(2**20)  # 4 MiB
    buffers = common.rotation((x, 1e-6), "cpu", at_most=5)
    assert len(buffers) == 5
    assert len({arguments[0].data_ptr() for arguments in buffers}) == 5
    assert all(arguments[1] == 1e-6 for arguments in buffers)


def test_the_spread_is_reported(common: ModuleType) -> None:
    assert common.summary([1e-6, 2e-6, 3e-6, 4e-6, 5e-6, 6e-6]) == pytest.approx(
        {"median_us": 3.5, "min_us": 1, "max_us": 6, "p20_us": 2, "p80_us": 5}
    )
    assert common.summary([2e-6])["p80_us"] == pytest.approx(2)


def test_time_once_divides_by_the_calls(common: ModuleType) -> None:
    seen = []
    assert common.time_once(seen.append, [(1,), (2,), (3,)], "cpu") >= 0
    assert seen == [1, 2, 3]
