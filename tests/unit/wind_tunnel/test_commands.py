"""The command line: what it prints from recorded runs (here of a planted law), and what it says when there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from minicpm_ref.cli import app
from minicpm_ref.wind_tunnel import Law, Sigmoid
from minicpm_ref.wind_tunnel.record import fitted_bench, recorded_law

HELD_OUT = Law(a=60.0, alpha=0.35, b=40.0, beta=0.3, floor=0.5)
SOLUTIONS = Law(a=60.0, alpha=0.35, b=40.0, beta=0.3, floor=0.3)
SCORE = Sigmoid(0.25, 0.95, 4.0, 1.5)
SIZES, TOKENS = (1e5, 4e5, 1.6e6), (1e6, 4e6, 1.6e7)
CIRCUMSTANCES = {"device": "a machine", "versions": {"torch": "0"}, "settings": {"planted": True}, "date": "2026-01-02"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Records of runs that follow the planted laws."""
    runs = [{"n": n, "d": d, "loss": HELD_OUT.loss(n, d)} for n in SIZES for d in TOKENS]
    base = {"n": 6e6, "d": 6e7, "loss": HELD_OUT.loss(6e6, 6e7)}
    write(tmp_path, "law", {"runs": runs, "base": base})
    generator = np.random.default_rng(0)
    models: list[dict[str, Any]] = []
    for n in SIZES:
        for d in TOKENS:
            loss = SOLUTIONS.loss(n, d)
            right = (np.arange(200) < round(200 * SCORE.score(loss))).astype(int)
            models.append(
                {"name": f"{n:g} {d:g}", "n": n, "d": d, "trained_by": "wind tunnel", "bits": [4 * loss] * 200}
                | {"right": generator.permutation(right).tolist()}
            )
    write(tmp_path, "bench", {"models": models, "solution_bytes": [4.0] * 200})
    return tmp_path


def write(folder: Path, name: str, results: dict[str, Any]) -> None:
    (folder / f"wind_tunnel_{name}.json").write_text(json.dumps(CIRCUMSTANCES | results))


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["wind-tunnel", *map(str, arguments)], env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_fit_and_predict_read_the_recorded_runs(data: Path) -> None:
    assert len(recorded_law(data)[0]) == 9
    assert "alpha" in run("fit", "--data", data, "--resamples", 5)
    shown = run("predict", "--data", data, "--resamples", 5)
    assert f"measured: {HELD_OUT.loss(6e6, 6e7):.3f}, +0.0 % off" in shown.replace("-0.0", "+0.0")


def test_search_finds_what_the_planted_laws_say(data: Path) -> None:
    law, sigmoid = fitted_bench(data, 5)
    assert law.law.alpha == pytest.approx(SOLUTIONS.alpha, rel=1e-3)
    assert sigmoid.sigmoid.score(1.2) == pytest.approx(SCORE.score(1.2), abs=0.02)
    assert "parameters" in run("search", "--score", 0.5, "--data", data, "--resamples", 5)
    with pytest.raises(ValueError, match="tokens <= 1e"):
        run("search", "--score", 0.5, "--tokens", 1e3, "--data", data, "--resamples", 5)
    with pytest.raises(ValueError, match="expected a score between"):
        run("search", "--score", 0.99, "--data", data, "--resamples", 5)


def test_what_was_not_recorded_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="wind_tunnel_law"):
        run("fit", "--data", tmp_path)


def test_coordinates_prints_a_slope_for_every_place() -> None:
    shown = run("coordinates", "--widths", "32,64", "--steps", 2)
    for place in ("embedding", "layer 2", "logits"):
        assert place in shown
