"""figures/draw.py: every chart is drawn from results, and what has not been measured is named and left out."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CIRCUMSTANCES: dict[str, Any] = {
    "device": {"name": "a machine"},
    "versions": {"torch": "2.13.0"},
    "settings": {"rounds": 3},
    "date": "2026-01-02T03:04:05+00:00",
}


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "figures")
    import draw

    return draw


def write(folder: Path, name: str, results: dict[str, Any]) -> None:
    (folder / f"{name}.json").write_text(json.dumps(results))


def rms_norm_rows() -> list[dict[str, Any]]:
    names = [("copy", "torch"), ("rms_norm", "torch"), ("rms_norm", "reference"), ("add_rms_norm", "torch")]
    return [
        {"function": f, "implementation": i, "tokens": t, "width": 64, "bytes": 512 * t, "median_us": 2.0 * t}
        for f, i in names
        for t in (1, 16)
    ]


def test_a_figure_is_drawn_from_its_data(draw: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "rms_norm_cpu", CIRCUMSTANCES | {"rows": rms_norm_rows()})
    draw.draw(["rms_norm_cpu", "rms_norm_cuda"], tmp_path, tmp_path)
    printed = capsys.readouterr().out
    assert "rms_norm_cpu: wrote rms_norm_cpu.svg and rms_norm_cpu.png" in printed
    assert "rms_norm_cuda: figures/data/rms_norm_cuda.json has not been measured yet" in printed
    assert (tmp_path / "rms_norm_cpu.svg").stat().st_size > 1000


def test_an_unknown_figure_is_named(draw: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"no figure is called \['nothing'\]"):
        draw.draw(["nothing"])


def test_data_without_circumstances_stops_the_drawing(draw: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "rms_norm_cpu", {"rows": rms_norm_rows()})
    with pytest.raises(ValueError, match="does not record 'device'"):
        draw.draw(["rms_norm_cpu"], tmp_path, tmp_path)
