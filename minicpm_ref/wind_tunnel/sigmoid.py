"""From the loss of reference solutions to a task score: a sigmoid with a floor and a ceiling.

score(loss) = floor + (ceiling - floor) / (1 + exp(slope (loss - middle)))

A model that knows nothing still scores the guessing rate, and a perfect one may stay below 1 because some tasks are
ambiguous; between the two the score rises as the loss falls. The floor is known from the tasks and is not fitted: tiny
models sit on it, and a fitted floor would explain their noise. Three numbers are fitted by least squares on scores.

The band is a bootstrap over *tasks*: the same tasks are drawn for every model, losses and scores are computed again,
and the sigmoid is fitted again. So it holds what a finite set of tasks leaves open, which is most of it.

Source: MiniCPM4 technical report (arXiv 2506.07900) section 2.3; Gadre et al., arXiv 2403.08540 (loss to task error).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minicpm_ref.wind_tunnel.law import quantiles

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Sigmoid:
    """The curve above; `slope` is per unit of loss and positive, so a higher loss never scores higher."""

    floor: float
    ceiling: float
    slope: float
    middle: float

    def score(self, loss: float) -> float:
        """The expected score at `loss`, between floor and ceiling."""
        # exp of a large number would overflow; written with tanh the curve is the same everywhere
        half = math.tanh(self.slope * (self.middle - loss) / 2)
        return self.floor + (self.ceiling - self.floor) * (1 + half) / 2

    def loss_for(self, score: float) -> float:
        """The loss at which `score` is expected. Raises ValueError for a score that the curve never takes.

        >>> round(Sigmoid(0.25, 0.95, 2.0, 1.5).loss_for(0.6), 6)
        1.5
        """
        if not self.floor < score < self.ceiling:
            raise ValueError(
                f"score = {score}: the fitted curve lies between {self.floor:.3f} (guessing) and {self.ceiling:.3f} "
                "(its ceiling); expected a score between the two"
            )
        return self.middle + math.log((self.ceiling - score) / (score - self.floor)) / self.slope


@dataclass(frozen=True)
class Scored:
    """One model on every task: `bits` of the solution and `right` (0 or 1), both [tasks]; `nbytes` is shared."""

    name: str
    bits: Array
    right: Array

    def loss(self, nbytes: Array) -> float:
        """Bits per byte of all solutions together."""
        return float(self.bits.sum() / nbytes.sum())

    def score(self) -> float:
        """The share of tasks that were answered right."""
        return float(self.right.mean())


@dataclass(frozen=True)
class FittedSigmoid:
    """A sigmoid, the sigmoids of the bootstrap, and how many resamples could not be fitted."""

    sigmoid: Sigmoid
    resampled: tuple[Sigmoid, ...]
    failed: int
    tasks: int

    def band(self, loss: float, coverage: float = 0.9, sampling: bool = True) -> tuple[float, float]:
        """The middle `coverage` of the scores expected at `loss`.

        With `sampling` the score itself is drawn too, as the share of `tasks` answers that come out right: that is the
        band in which the *measured* score of another model should lie. Without it, it is the band of the curve.
        """
        expected = np.array([sigmoid.score(loss) for sigmoid in self.resampled])
        if sampling and len(expected):
            expected = np.random.default_rng(0).binomial(self.tasks, np.repeat(expected, 20)) / self.tasks
        return quantiles(expected.tolist(), coverage)


def fit_sigmoid(losses: Sequence[float], scores: Sequence[float], floor: float) -> Sigmoid:
    """The curve through (loss, score) pairs by least squares. Raises ValueError when they cannot determine it."""
    from scipy.optimize import least_squares

    x, y = np.asarray(losses, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} losses and {len(y)} scores: expected as many of each")
    if len(np.unique(x)) < 4:
        raise ValueError(f"{len(np.unique(x))} different losses for 3 unknown numbers: expected at least 4")
    if not 0 <= floor < 1:
        raise ValueError(f"floor = {floor}: expected the guessing rate, from 0 to below 1")
    if y.max() - floor < 0.05:
        raise ValueError(
            f"the best score is {y.max():.3f}, guessing gives {floor:.3f}: no model has left the floor, so neither "
            "middle nor slope can be known; add better models"
        )
    spread = float(x.max() - x.min())

    def residuals(z: Array) -> Array:
        half = np.tanh(np.exp(z[1]) * (z[2] - x) / 2)
        predicted: Array = floor + (z[0] - floor) * (1 + half) / 2 - y
        return predicted

    best = None
    for slope in (2 / spread, 8 / spread):
        for middle in np.quantile(x, (0.1, 0.5, 0.9)):
            found = least_squares(
                residuals,
                [min(1.0, max(float(y.max()), floor + 0.1)), math.log(slope), middle],
                # a middle far outside the data would make the curve an exponential without a ceiling
                bounds=(
                    [floor + 0.01, math.log(0.1 / spread), x.min() - 2 * spread],
                    [1.0001, math.log(100 / spread), x.max() + spread],
                ),
            )
            if best is None or found.cost < best.cost:
                best = found
    assert best is not None
    return Sigmoid(floor, min(1.0, float(best.x[0])), math.exp(best.x[1]), float(best.x[2]))


def bootstrap_sigmoid(
    models: Sequence[Scored], nbytes: Array, floor: float, resamples: int = 100, seed: int = 0
) -> FittedSigmoid:
    """`fit_sigmoid` of the models on all tasks, and on `resamples` draws of as many tasks with replacement.

    `nbytes` [tasks] is the length of each solution.
    """
    sigmoid = fit_sigmoid([m.loss(nbytes) for m in models], [m.score() for m in models], floor)
    generator = np.random.default_rng(seed)
    resampled: list[Sigmoid] = []
    failed = 0
    for _ in range(resamples):
        tasks = generator.integers(0, len(nbytes), len(nbytes))
        losses = [float(m.bits[tasks].sum() / nbytes[tasks].sum()) for m in models]
        scores = [float(m.right[tasks].mean()) for m in models]
        try:
            resampled.append(fit_sigmoid(losses, scores, floor))
        except ValueError:  # a draw on which no model leaves the floor; counted, not hidden
            failed += 1
    return FittedSigmoid(sigmoid, tuple(resampled), failed, len(nbytes))
