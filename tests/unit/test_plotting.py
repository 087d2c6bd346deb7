"""The figure style: results without their circumstances are refused, and the same data gives the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minicpm_ref import plotting

ROOT = Path(__file__).parents[2]
RESULTS: dict[str, Any] = {
    "device": {"name": "a machine"},
    "versions": {"torch": "2.13.0"},
    "settings": {"rounds": 3},
    "date": "2026-01-02T03:04:05+00:00",
    "rows": [],
}


def write(folder: Path, results: Any, name: str = "run") -> None:
    (folder / f"{name}.json").write_text(json.dumps(results))


def test_complete_results_are_read(tmp_path: Path) -> None:
    write(tmp_path, RESULTS)
    assert plotting.load_results("run", tmp_path) == RESULTS


@pytest.mark.parametrize("key", plotting.REQUIRED)
@pytest.mark.parametrize("empty", [True, False])
def test_results_without_circumstances_are_refused(tmp_path: Path, key: str, empty: bool) -> None:
    broken = {k: v for k, v in RESULTS.items() if k != key} | ({key: {}} if empty else {})
    write(tmp_path, broken)
    with pytest.raises(ValueError, match=f"run.json does not record '{key}'"):
        plotting.load_results("run", tmp_path)


def test_other_files_are_refused_in_words(tmp_path: Path) -> None:
    write(tmp_path, [1])
    with pytest.raises(ValueError, match="holds a list, expected an object"):
        plotting.load_results("run", tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is not JSON"):
        plotting.load_results("run", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no results called 'walk'.*\['run'\]"):
        plotting.load_results("walk", tmp_path)


def test_every_committed_result_records_its_circumstances() -> None:
    for path in sorted((ROOT / "figures" / "data").glob("*.json")):
        plotting.load_results(path.stem)


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for attempt in ("one", "two"):
        with plotting.styled():
            fig, ax = plt.subplots()
            ax.plot([1, 2], [3, 4], label="line")
            ax.legend()
            paths = plotting.save_figure(fig, "test", tmp_path / attempt)
            plt.close(fig)
        assert [path.name for path in paths] == ["test.svg", "test.png"]
        written.append([path.read_bytes() for path in paths])
    assert written[0] == written[1]
    assert b"<svg" in written[0][0]
    assert b"dc:date" not in written[0][0]


def test_the_style_does_not_leak() -> None:
    import matplotlib

    before = matplotlib.rcParams["svg.hashsalt"]
    with plotting.styled():
        assert matplotlib.rcParams["svg.hashsalt"] == "minicpm_ref"
        assert matplotlib.rcParams["axes.prop_cycle"].by_key()["color"] == list(plotting.COLOURS.values())
    assert matplotlib.rcParams["svg.hashsalt"] == before


def test_importing_the_style_does_not_import_matplotlib() -> None:
    code = "import sys, minicpm_ref.plotting; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_roofline() -> None:
    assert plotting.attainable(0.5, bandwidth=100, peak=1000) == 50
    assert plotting.attainable(10, bandwidth=100, peak=1000) == 1000
    assert plotting.attainable(99, bandwidth=100, peak=1000) == 1000
    with pytest.raises(ValueError, match="expected positive numbers"):
        plotting.attainable(1, bandwidth=0, peak=1)


def test_a_roofline_is_drawn_with_its_points() -> None:
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    plotting.draw_roofline(ax, 1e11, 1e12, {"norm": (0.5, None), "matmul": (50.0, 8e11)}, label="a machine")
    roof, *points = ax.get_lines()
    assert list(roof.get_ydata())[1:] == [1e12, 1e12]
    assert [(float(p.get_xdata()[0]), float(p.get_ydata()[0])) for p in points] == [(0.5, 5e10), (50.0, 8e11)]
    assert points[0].get_markerfacecolor() == "white"  # a prediction is hollow
