"""The scaling law: planted laws come back, spoilt runs barely pull, and data that cannot tell are refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from minicpm_ref.wind_tunnel import Law, Run, bootstrap_law, fit_law
from minicpm_ref.wind_tunnel.law import huber

PLANTED = Law(a=482.0, alpha=0.348, b=2085.4, beta=0.366, floor=1.82)
SIZES, TOKENS = np.geomspace(4e7, 1.6e10, 7), np.geomspace(1e9, 4e11, 7)
GRID = [Run(n, d, PLANTED.loss(n, d)) for n in SIZES for d in TOKENS]


def numbers(law: Law) -> list[float]:
    return [law.a, law.alpha, law.b, law.beta, law.floor]


def test_a_planted_law_comes_back_exactly() -> None:
    assert numbers(fit_law(GRID)) == pytest.approx(numbers(PLANTED), rel=1e-6)


def test_units_and_order_of_the_runs_change_nothing() -> None:
    scaled = fit_law([Run(run.n / 1e6, run.d / 1e9, run.loss * 1e3) for run in reversed(GRID)])
    assert (scaled.alpha, scaled.beta) == pytest.approx((PLANTED.alpha, PLANTED.beta), rel=1e-3)
    assert scaled.loss(1e10 / 1e6, 1e12 / 1e9) == pytest.approx(PLANTED.loss(1e10, 1e12) * 1e3, rel=1e-3)


def test_one_spoilt_run_pulls_with_bounded_force() -> None:
    runs = list(GRID)
    runs[6] = replace(runs[6], loss=runs[6].loss + 1)
    law = fit_law(runs)
    assert law.alpha == pytest.approx(PLANTED.alpha, abs=1e-3)
    assert law.beta == pytest.approx(PLANTED.beta, abs=1e-3)
    assert (law.a, law.b) == pytest.approx((PLANTED.a, PLANTED.b), rel=0.01)
    squares = fit_law(runs, delta=10.0)  # so wide a corner is least squares, which the same run bends
    assert abs(squares.alpha - PLANTED.alpha) > 0.05


def test_the_band_of_noisy_runs_covers_the_truth() -> None:
    generator = np.random.default_rng(3)
    grid = [Run(n, d, PLANTED.loss(n, d)) for n in SIZES[::2] for d in TOKENS[::2]]
    noisy = [replace(run, loss=run.loss * math.exp(0.01 * generator.normal())) for run in grid]
    fitted = bootstrap_law(noisy, resamples=12)
    low, high = fitted.band(1e11, 2e12, coverage=1.0)
    assert low < PLANTED.loss(1e11, 2e12) < high
    assert high / low > 1.001, "a band without width says that noise does not matter"
    assert fitted.failed + len(fitted.resampled) == 12


def test_compute_optimal_is_the_published_closed_form() -> None:
    best = PLANTED.compute_optimal(1e20)
    assert (best.n, best.d) == pytest.approx((8.54e8, 1.951e10), rel=1e-3)
    best = Law(a=406.4, alpha=0.34, b=410.7, beta=0.28, floor=1.69).compute_optimal(1e20)
    assert (best.n, best.d) == pytest.approx((6.45e8, 2.585e10), rel=1e-3)
    sizes = np.geomspace(best.n / 30, best.n * 30, 2001)
    law = Law(a=406.4, alpha=0.34, b=410.7, beta=0.28, floor=1.69)
    assert best.loss <= min(law.loss(n, 1e20 / 6 / n) for n in sizes)


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        pytest.param([run for run in GRID if run.d == TOKENS[0]], "1 different token counts", id="one token count"),
        pytest.param([run for run in GRID if run.n == SIZES[0]], "1 different sizes", id="one size"),
        pytest.param([run for run in GRID if run.n in SIZES[:2]], "2 different sizes", id="two sizes"),
        pytest.param(GRID[:1] * 9 + GRID[8:10], "3 different", id="three points, repeated"),
        pytest.param([run for i, run in enumerate(GRID) if i % 8 == 0], "cannot be told apart", id="diagonal"),
        pytest.param([replace(GRID[0], counting="all"), *GRID[1:]], "counted in different ways", id="two countings"),
    ],
)
def test_data_that_cannot_determine_a_law_are_refused(runs: list[Run], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit_law(runs)


def test_a_term_that_does_not_show_is_refused() -> None:
    flat = [replace(run, loss=2085.4 * run.d**-0.366 + 1.82) for run in GRID]
    with pytest.raises(ValueError, match="do not determine"):
        fit_law(flat)


@pytest.mark.parametrize("loss", [0.0, -1.0, math.nan, math.inf])
def test_impossible_runs_are_refused(loss: float) -> None:
    with pytest.raises(ValueError, match="loss"):
        Run(1e6, 1e6, loss)


def test_huber_is_quadratic_then_linear() -> None:
    assert huber(np.array([0.0, 0.5, 1.0, 3.0, -3.0]), 1.0).tolist() == [0, 0.125, 0.5, 2.5, 2.5]


def test_tokens_for_inverts_the_loss() -> None:
    assert PLANTED.tokens_for(1e9, PLANTED.loss(1e9, 3e10)) == pytest.approx(3e10, rel=1e-9)
    assert PLANTED.tokens_for(1e9, 1.82) == math.inf
