"""The scaling law L(N, D) = A N^-alpha + B D^-beta + L_0: fitted to small runs, read at large ones.

Three terms: what a model of N parameters cannot hold, what D tokens cannot teach, and what nothing can predict. Five
numbers come out of a dozen runs, so most of the work is to know when they do *not* come out.

* Residuals are those of log L, because a run's noise is a share of its loss. They are summed under a Huber loss
  (quadratic up to `delta`, linear beyond), so that one spoilt run pulls with a bounded force.
* For given exponents the other three numbers are a linear problem. So the starts are a grid of exponents, each with
  its linear solution; the best ones are polished by scipy. Sizes and losses are first divided by their geometric
  means: other units, another order or a factor before the objective change nothing.
* Bands: whole runs are drawn with replacement and everything is fitted again, starts included.
* Data that cannot determine the law are refused in words. A curve with one D cannot tell B D^-beta from L_0; runs with
  D proportional to N cannot tell the first term from the second.

Only the *end* of a decay is a run here: points along one loss curve hang together and lie above what a decay reaches.
N and D must be counted one way in all runs (`Run.counting`); ours is `candidate.multiplied_parameters`.

Left out: a law for the batch size (MiniCPM: 1.21e9 / L^6.24 tokens), which needs runs at several batch sizes.

Sources: MiniCPM, arXiv 2404.06395 section 4.4; Hoffmann et al., arXiv 2203.15556 section 3.3 and appendix D.3 (Huber
loss on log residuals); Besiroglu et al., arXiv 2404.10102 (what stopping the minimiser early did to that fit).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

EXPONENTS = np.linspace(0.05, 1.5, 12)  # both exponents of the starts: 144 in all
POLISHED = 4  # how many of the starts go on to scipy
DELTA = 1e-3  # residuals of log L beyond this pull linearly


@dataclass(frozen=True)
class Run:
    """One finished run: `n` parameters, `d` tokens, `loss` in any unit; `counting` names how n was counted."""

    n: float
    d: float
    loss: float
    counting: str = "multiplied"

    def __post_init__(self) -> None:
        for name in ("n", "d", "loss"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} = {value}: expected a positive, finite number")


@dataclass(frozen=True)
class Optimum:
    """The best use of a compute budget: `n` parameters, `d` tokens, and the `loss` they are predicted to reach."""

    n: float
    d: float
    loss: float


@dataclass(frozen=True)
class Law:
    """L(N, D) = a N^-alpha + b D^-beta + floor.

    >>> law = Law(a=406.4, alpha=0.34, b=410.7, beta=0.28, floor=1.69)
    >>> round(law.loss(70e9, 1.4e12), 3)
    1.937
    """

    a: float
    alpha: float
    b: float
    beta: float
    floor: float

    def loss(self, n: float, d: float) -> float:
        """Predicted loss of `n` parameters after `d` tokens."""
        return self.a * n**-self.alpha + self.b * d**-self.beta + self.floor

    def compute_optimal(self, flops: float) -> Optimum:
        """The N and D with 6 N D = `flops` and the least loss, in closed form.

        Setting the derivative along the hyperbola to zero gives alpha a N^-alpha = beta b D^-beta: both terms matter
        alike there, each weighted by its exponent.
        """
        if not flops > 0:
            raise ValueError(f"flops = {flops}: expected a positive number")
        product, total = flops / 6, self.alpha + self.beta
        n = (self.alpha * self.a / (self.beta * self.b)) ** (1 / total) * product ** (self.beta / total)
        return Optimum(n, product / n, self.loss(n, product / n))

    def tokens_for(self, n: float, loss: float) -> float:
        """The D at which `n` parameters reach `loss`; infinity when they never do."""
        left = loss - self.floor - self.a * n**-self.alpha
        if left <= 0:
            return math.inf
        log_d = math.log(self.b / left) / self.beta
        return math.exp(log_d) if log_d < 700 else math.inf  # e^709 is the largest number


@dataclass(frozen=True)
class FittedLaw:
    """A law, the laws of the bootstrap, and how many resamples could not determine one."""

    law: Law
    resampled: tuple[Law, ...]
    failed: int

    def band(self, n: float, d: float, coverage: float = 0.9) -> tuple[float, float]:
        """The middle `coverage` of what the resampled laws predict at (n, d)."""
        return quantiles([law.loss(n, d) for law in self.resampled], coverage)


def quantiles(values: Sequence[float], coverage: float) -> tuple[float, float]:
    """The middle `coverage` of `values`. Raises ValueError when there are none."""
    if not values:
        raise ValueError("no resampled value: a band needs a bootstrap (resamples > 0) that could be fitted")
    low, high = np.quantile(values, [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(low), float(high)


def fit_law(runs: Sequence[Run], delta: float = DELTA) -> Law:
    """The law that fits `runs` best. Raises ValueError, in words, for runs that cannot determine one."""
    check_runs(runs)
    n, d, loss = (np.array([getattr(run, name) for run in runs], dtype=np.float64) for name in ("n", "d", "loss"))
    # in units of the geometric means: logs of n and d are then small numbers around 0
    units = [float(np.exp(np.log(values).mean())) for values in (n, d, loss)]
    log_n, log_d, target = (np.log(values / unit) for values, unit in zip((n, d, loss), units, strict=True))
    best = min(
        (_polish(start, log_n, log_d, target, delta) for start in _starts(log_n, log_d, target, delta)),
        key=lambda found: found[0],
    )[1]
    a, alpha, b, beta, floor = best
    _check_determined(best, log_n, log_d, target)
    return Law(a * units[2] * units[0] ** alpha, alpha, b * units[2] * units[1] ** beta, beta, floor * units[2])


def bootstrap_law(runs: Sequence[Run], resamples: int = 100, seed: int = 0, delta: float = DELTA) -> FittedLaw:
    """`fit_law` of the runs, and of `resamples` draws of as many runs with replacement."""
    law = fit_law(runs, delta)
    generator = np.random.default_rng(seed)
    laws: list[Law] = []
    failed = 0
    for _ in range(resamples):
        drawn = [runs[i] for i in generator.integers(0, len(runs), len(runs))]
        try:
            laws.append(fit_law(drawn, delta))
        except ValueError:  # a draw can miss a size or a token count; such draws are counted, not hidden
            failed += 1
    return FittedLaw(law, tuple(laws), failed)


def check_runs(runs: Sequence[Run]) -> None:
    """Raise ValueError when `runs` cannot determine five numbers, saying what is missing."""
    counted = sorted({run.counting for run in runs})
    if len(counted) > 1:
        raise ValueError(f"N is counted in different ways ({', '.join(counted)}): count it one way in all runs")
    points = {(run.n, run.d) for run in runs}
    if len(points) < 6:
        raise ValueError(f"{len(points)} different (N, D) for 5 unknown numbers: expected at least 6")
    for letter, word, values in (("N", "sizes", {n for n, _ in points}), ("D", "token counts", {d for _, d in points})):
        if len(values) < 3:
            raise ValueError(
                f"{len(values)} different {word}: the term in {letter} cannot be told from the constant; "
                f"expected at least 3 {word}"
            )
    n, d = (np.log(np.array(column)) for column in zip(*points, strict=True))
    correlation = abs(float(np.corrcoef(n, d)[0, 1]))
    if correlation > 0.98:
        raise ValueError(
            f"log N and log D are correlated at {correlation:.3f}: the two terms cannot be told apart; "
            "train some small models longer and some large ones shorter"
        )


def huber(residuals: Array, delta: float) -> Array:
    """r^2 / 2 up to `delta`, delta (|r| - delta / 2) beyond; over `delta`^2, so that the numbers are of size 1."""
    size = np.abs(residuals) / delta
    return np.where(size <= 1, size**2 / 2, size - 0.5)


def _starts(log_n: Array, log_d: Array, target: Array, delta: float) -> list[Array]:
    """(a, alpha, b, beta, floor) of the best grid points, each with the linear solution for its exponents."""
    alphas, betas = (grid.ravel() for grid in np.meshgrid(EXPONENTS, EXPONENTS, indexing="ij"))
    loss = np.exp(target)
    # [grid point, run, term]; every row over the loss, which makes the residuals relative, close to those of log L
    design = np.stack(
        [np.exp(-alphas[:, None] * log_n), np.exp(-betas[:, None] * log_d), np.ones((len(alphas), len(loss)))], -1
    )
    weighted = design / loss[None, :, None]
    gram = weighted.transpose(0, 2, 1) @ weighted + 1e-12 * np.eye(3)
    linear = np.linalg.solve(gram, weighted.sum(1)[..., None])[..., 0].clip(1e-6)
    predicted = np.einsum("grt,gt->gr", design, linear)
    objective = huber(np.log(predicted) - target, delta).sum(1)
    order = np.argsort(objective, kind="stable")[:POLISHED]
    return [np.array([linear[i, 0], alphas[i], linear[i, 1], betas[i], linear[i, 2]]) for i in order]


def _residuals(x: Array, log_n: Array, log_d: Array, target: Array) -> tuple[Array, Array]:
    """log L predicted - log L seen [runs], and its derivatives [runs, 5] by (log a, alpha, log b, beta, floor)."""
    first, second = np.exp(x[0] - x[1] * log_n), np.exp(x[2] - x[3] * log_d)
    predicted = first + second + x[4]
    slopes = np.stack([first, -first * log_n, second, -second * log_d, np.ones_like(first)], -1)
    return np.log(predicted) - target, slopes / predicted[:, None]


def _polish(start: Array, log_n: Array, log_d: Array, target: Array, delta: float) -> tuple[float, tuple[float, ...]]:
    """The minimum that scipy finds from `start`: objective, and (a, alpha, b, beta, floor)."""
    from scipy.optimize import least_squares

    x = np.array([math.log(start[0]), start[1], math.log(start[2]), start[3], start[4]])
    # the whole way down with tightening corners: with delta itself at once, far from the minimum every residual is in
    # the linear part, where the objective has no curvature that a step could be taken from
    for width in (1.0, 30 * delta, delta):
        found = least_squares(
            lambda x: _residuals(x, log_n, log_d, target)[0],
            x,
            jac=lambda x: _residuals(x, log_n, log_d, target)[1],
            bounds=([-30, 1e-3, -30, 1e-3, 0], [30, 5, 30, 5, np.inf]),
            loss="huber",
            f_scale=width,
            x_scale="jac",
            ftol=1e-15,
            xtol=1e-12,
            gtol=None,
            max_nfev=500,
        )
        x = found.x
    objective = float(huber(_residuals(x, log_n, log_d, target)[0], delta).sum())
    return objective, (math.exp(x[0]), float(x[1]), math.exp(x[2]), float(x[3]), float(x[4]))


def _check_determined(best: Sequence[float], log_n: Array, log_d: Array, target: Array) -> None:
    """Raise ValueError when some direction of the five numbers does not show in any run."""
    a, alpha, b, beta, floor = best
    slopes = _residuals(np.array([math.log(a), alpha, math.log(b), beta, floor]), log_n, log_d, target)[1]
    scaled = slopes / np.linalg.norm(slopes, axis=0).clip(1e-300)
    smallest = float(np.linalg.svd(scaled, compute_uv=False)[-1])
    if smallest < 1e-4:
        raise ValueError(
            f"the runs do not determine the law (smallest singular value of the fit {smallest:.1e}): one of its terms "
            "is too small or too straight to be told from the others; spread N and D further"
        )
