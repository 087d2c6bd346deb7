"""The search: as cheap as brute force finds, in one dimension, and an impossible target names the limit that binds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from minicpm_ref.wind_tunnel import (
    Costs,
    FittedLaw,
    FittedSigmoid,
    Infeasible,
    Law,
    Limits,
    Sigmoid,
    cheapest,
    cheapest_for_score,
)

LAW = Law(a=406.4, alpha=0.34, b=410.7, beta=0.28, floor=1.69)
TARGET = 2.4
BEST = cheapest(LAW, TARGET)


def brute_force(loss: float, costs: Costs, limits: Limits) -> float:
    """The least cost on a fine grid of sizes, each with the tokens it needs."""
    found = math.inf
    for n in np.geomspace(1e6, 1e13, 20_001).tolist():
        d = LAW.tokens_for(n, loss)
        if n <= limits.parameters and d <= limits.tokens and 6 * n * d <= limits.flops:
            found = min(found, costs.total(n, d))
    return found


@pytest.mark.parametrize(
    "costs",
    [
        Costs(),
        Costs(training_flop=1e-18, serving_flop=1e-18, served_tokens=1e12),
        Costs(training_flop=1e-18, data_token=1e-6),
        Costs(training_flop=0.0, data_token=1e-6, serving_flop=1e-18, served_tokens=1e13),
    ],
    ids=["flops", "serving", "data", "data and serving"],
)
@pytest.mark.parametrize(
    "limits",
    [
        Limits(),
        Limits(parameters=BEST.n / 2),
        Limits(tokens=BEST.d / 3),
        Limits(flops=BEST.flops * 1.2),
        Limits(parameters=BEST.n * 0.8, tokens=BEST.d * 2, flops=BEST.flops * 1.5),
    ],
    ids=["free", "parameters", "tokens", "flops", "all"],
)
def test_as_cheap_as_brute_force(costs: Costs, limits: Limits) -> None:
    plan = cheapest(LAW, TARGET, costs, limits)
    assert LAW.loss(plan.n, plan.d) == pytest.approx(TARGET, abs=1e-9)
    assert plan.n <= limits.parameters * (1 + 1e-9)
    assert plan.d <= limits.tokens * (1 + 1e-6)
    assert plan.flops <= limits.flops * (1 + 1e-6)
    least = brute_force(TARGET, costs, limits)
    assert plan.cost <= least * (1 + 1e-6)  # never dearer than the grid's best ...
    assert plan.cost >= least * (1 - 1e-3)  # ... and cheaper only by what a grid step is worth


def test_without_prices_the_cheapest_is_compute_optimal() -> None:
    best = LAW.compute_optimal(BEST.flops)
    assert (best.n, best.d, best.loss) == pytest.approx((BEST.n, BEST.d, TARGET), rel=1e-4)


@pytest.mark.parametrize(
    ("limits", "binding"),
    [
        (Limits(parameters=1e6), ("parameters",)),
        (Limits(tokens=1e6), ("tokens",)),
        (Limits(flops=BEST.flops * 0.9), ("flops",)),
        (Limits(parameters=BEST.n / 3, tokens=BEST.d), ("parameters", "tokens")),
        (Limits(tokens=BEST.d / 4, flops=BEST.flops * 1.01), ("tokens", "flops")),
        (Limits(parameters=BEST.n / 3, flops=BEST.flops * 1.01), ("parameters", "flops")),
    ],
)
def test_an_impossible_target_names_the_limit(limits: Limits, binding: tuple[str, ...]) -> None:
    with pytest.raises(Infeasible, match=" together with ".join(f"{name} <=.*" for name in binding)) as caught:
        cheapest(LAW, TARGET, limits=limits)
    assert caught.value.binding == binding


def test_a_loss_below_the_floor_is_out_of_reach() -> None:
    with pytest.raises(Infeasible, match="floor of 1.69"):
        cheapest(LAW, 1.69)


def test_a_score_becomes_a_loss_becomes_a_plan() -> None:
    sigmoid = Sigmoid(0.25, 0.95, 3.0, 2.5)
    laws, sigmoids = (LAW, Law(500, 0.34, 410.7, 0.28, 1.69)), (sigmoid, Sigmoid(0.25, 0.5, 3.0, 2.5))
    plan, bands, failed = cheapest_for_score(FittedLaw(LAW, laws, 0), FittedSigmoid(sigmoid, sigmoids, 0, 200), 0.6)
    assert sigmoid.score(plan.loss) == pytest.approx(0.6)
    assert failed == 1, "the second sigmoid never reaches 0.6"
    assert bands["cost"] == pytest.approx((plan.cost, plan.cost))


@pytest.mark.parametrize("wrong", [{"training_flop": -1.0}, {"data_token": math.nan}, {"training_flop": 0.0}])
def test_prices_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="training_flop|data_token"):
        Costs(**wrong)
