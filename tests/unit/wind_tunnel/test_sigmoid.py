"""Loss to score: planted sigmoids come back, the band covers, and data on the floor are refused."""

from __future__ import annotations

import numpy as np
import pytest

from minicpm_ref.wind_tunnel import Scored, Sigmoid, bootstrap_sigmoid, fit_sigmoid

PLANTED = Sigmoid(floor=0.25, ceiling=0.9, slope=4.0, middle=1.6)
LOSSES = np.linspace(0.8, 2.8, 9)


def test_a_planted_sigmoid_comes_back() -> None:
    found = fit_sigmoid(LOSSES.tolist(), [PLANTED.score(loss) for loss in LOSSES], 0.25)
    assert vars(found) == pytest.approx(vars(PLANTED), rel=1e-4)


def test_the_curve_falls_from_ceiling_to_floor_and_inverts() -> None:
    scores = [PLANTED.score(loss) for loss in np.linspace(-500, 500, 101)]
    assert scores == sorted(scores, reverse=True)
    assert (scores[0], scores[-1]) == pytest.approx((0.9, 0.25))
    assert PLANTED.score(PLANTED.loss_for(0.4)) == pytest.approx(0.4)
    for outside in (0.25, 0.9, 0.1, 1.0):
        with pytest.raises(ValueError, match=r"score = .* expected a score between"):
            PLANTED.loss_for(outside)


def simulated(seed: int, tasks: int = 200) -> list[Scored]:
    """Models whose answers are right with the planted probability at their loss."""
    generator = np.random.default_rng(seed)
    models = []
    for i, loss in enumerate(LOSSES):
        bits = loss * generator.gamma(4, 1 / 4, tasks)
        models.append(Scored(str(i), bits, (generator.random(tasks) < PLANTED.score(loss)).astype(float)))
    return models


def test_a_model_that_was_not_fitted_lies_in_the_band() -> None:
    inside = 0
    for seed in range(4):
        models = simulated(seed)
        held_out = models.pop(0)  # the best model, predicted from worse ones
        fitted = bootstrap_sigmoid(models, np.ones(200), 0.25, resamples=10)
        low, high = fitted.band(held_out.loss(np.ones(200)))
        assert low < high
        inside += low <= held_out.score() <= high
    assert inside >= 3, f"{inside} of 4 inside a band of 90 %"


@pytest.mark.parametrize(
    ("losses", "scores", "floor", "words"),
    [
        ([1, 2, 3], [0.9, 0.5, 0.3], 0.25, "3 different losses"),
        ([1, 2, 3, 4], [0.26, 0.25, 0.24, 0.27], 0.25, "no model has left the floor"),
        ([1, 2, 3, 4], [0.9, 0.5, 0.3], 0.25, "4 losses and 3 scores"),
        ([1, 2, 3, 4], [0.9, 0.5, 0.3, 0.2], 1.0, "floor = 1.0"),
    ],
)
def test_data_that_cannot_determine_a_sigmoid_are_refused(
    losses: list[float], scores: list[float], floor: float, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        fit_sigmoid(losses, scores, floor)
