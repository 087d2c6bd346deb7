"""The cheapest model for a target: invert the sigmoid, then walk the iso-loss curve.

A target score is a target loss (`Sigmoid.loss_for`), and a loss is a curve in the (N, D) plane: for each N above the
least size that can reach it at all, D(N) = (B / (L - L_0 - A N^-alpha))^(1 / beta). So there is one unknown, not two.
With x = log N every cost here is convex in x: L - L_0 - A e^(-alpha x) is concave, minus the logarithm of a concave
function is convex, and so are its exponential and sums. A convex function of one variable has one minimum and is found
to any precision in some forty evaluations, where a 100 x 100 grid needs 10,000 and is off by half a cell.

Limits on parameters, tokens and training FLOPs each cut an interval out of x: N and D in closed form, FLOPs = 6 N D by
bisection on both sides of its minimum. An empty intersection is an error that names the limits which leave nothing.

Units: FLOPs are FLOPs (not PFLOP/s-days), 6 N D to train and 2 N a token to serve; prices are in any one currency.

Left out: hardware that gets cheaper in bulk, attention's own FLOPs, and integers (a layer more or less).
Source: Hoffmann et al., arXiv 2203.15556 section 3.3; Sardana et al., arXiv 2401.00448 (inference in the objective).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from minicpm_ref.wind_tunnel.law import FittedLaw, Law, quantiles
from minicpm_ref.wind_tunnel.sigmoid import FittedSigmoid

LARGEST = math.log(1e18)  # parameters; the upper end of a search that no limit bounds


@dataclass(frozen=True)
class Costs:
    """What things cost, in one currency: a training FLOP, a serving FLOP, and a token of training data.

    `served_tokens` is how many tokens the model will read and write in its life.
    """

    training_flop: float = 1.0
    serving_flop: float = 0.0
    served_tokens: float = 0.0
    data_token: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} = {value}: expected 0 or a positive, finite number")
        if self.training_flop + self.data_token <= 0:
            raise ValueError("training_flop and data_token are both 0: then endless training is free")

    def total(self, n: float, d: float) -> float:
        """Cost of training `n` parameters on `d` tokens and serving the result."""
        if math.isinf(d):  # endless training costs endlessly, also where one of the prices is 0
            return math.inf
        training = 6 * n * d * self.training_flop + d * self.data_token
        return training + 2 * n * self.served_tokens * self.serving_flop


@dataclass(frozen=True)
class Limits:
    """The most parameters, training tokens and training FLOPs allowed; infinity for no limit."""

    parameters: float = math.inf
    tokens: float = math.inf
    flops: float = math.inf

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} = {value}: expected a positive number")


@dataclass(frozen=True)
class Plan:
    """The cheapest (n, d) that reaches `loss`, its training FLOPs and its cost."""

    n: float
    d: float
    loss: float
    flops: float
    cost: float


class Infeasible(ValueError):
    """No (N, D) reaches the target within the limits; `binding` names the limits that leave nothing."""

    def __init__(self, message: str, binding: tuple[str, ...]):
        super().__init__(message)
        self.binding = binding


def cheapest(law: Law, loss: float, costs: Costs | None = None, limits: Limits | None = None) -> Plan:
    """The cheapest (N, D) whose predicted loss is `loss`, within `limits`.

    Raises `Infeasible` when there is none. Without prices the cost is the training FLOPs.

    >>> law = Law(a=406.4, alpha=0.34, b=410.7, beta=0.28, floor=1.69)
    >>> plan = cheapest(law, law.compute_optimal(1e20).loss)
    >>> f"{plan.flops:.4g}"
    '1e+20'
    """
    costs, limits = costs or Costs(), limits or Limits()
    if loss <= law.floor:
        raise Infeasible(f"loss {loss:.4f} is not above the law's floor of {law.floor:.4f}: no size reaches it", ())
    smallest = math.log(law.a / (loss - law.floor)) / law.alpha  # here the loss is reached only with endless data

    def tokens(x: float) -> float:
        return law.tokens_for(math.exp(x), loss)

    def flops(x: float) -> float:
        return 6 * math.exp(x) * tokens(x)

    # each limit as an interval of x = log N
    allowed = {"parameters": (smallest, min(LARGEST, math.log(limits.parameters)))}
    left = loss - law.floor - law.b * limits.tokens**-law.beta
    least = math.log(law.a / left) / law.alpha if left > 0 else math.inf
    allowed["tokens"] = (least, LARGEST)
    frugal = _minimum(flops, smallest, LARGEST)
    if flops(frugal) > limits.flops * (1 + 1e-9):
        allowed["flops"] = (math.inf, -math.inf)
    else:
        allowed["flops"] = (
            _crossing(flops, limits.flops, frugal, smallest),
            _crossing(flops, limits.flops, frugal, LARGEST),
        )
    low, high = max(lo for lo, _ in allowed.values()), min(hi for _, hi in allowed.values())
    if low > high:
        raise _explain(allowed, limits, loss, math.exp(smallest), flops(frugal))
    x = _minimum(lambda x: costs.total(math.exp(x), tokens(x)), low, high)
    n, d = math.exp(x), tokens(x)
    return Plan(n, d, loss, 6 * n * d, costs.total(n, d))


def cheapest_for_score(
    law: FittedLaw,
    sigmoid: FittedSigmoid,
    score: float,
    costs: Costs | None = None,
    limits: Limits | None = None,
    coverage: float = 0.9,
) -> tuple[Plan, dict[str, tuple[float, float]], int]:
    """`cheapest` for a target score, the bands of its "n", "d" and "cost", and how many resamples cannot reach it.

    Law i and sigmoid i of the two bootstraps are taken together; both fits must be of the same loss.
    """
    plan = cheapest(law.law, sigmoid.sigmoid.loss_for(score), costs, limits)
    plans: list[Plan] = []
    failed = 0
    pairs = list(zip(law.resampled, sigmoid.resampled, strict=False))
    for one_law, one_sigmoid in pairs:
        try:
            plans.append(cheapest(one_law, one_sigmoid.loss_for(score), costs, limits))
        except ValueError:  # out of this sigmoid's range, or infeasible under this law
            failed += 1
    bands = (
        {name: quantiles([getattr(p, name) for p in plans], coverage) for name in ("n", "d", "cost")} if plans else {}
    )
    return plan, bands, failed


def _minimum(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a convex function is least on [low, high]: golden section, which needs no derivative."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = low, high
    left, right = b - ratio * (b - a), a + ratio * (b - a)
    at_left, at_right = function(left), function(right)
    while b - a > 1e-9 * max(1.0, abs(a)):
        # infinity on the left means that there the loss is out of reach, so that side is never kept
        if at_left < at_right:
            b, right, at_right = right, left, at_left
            left = b - ratio * (b - a)
            at_left = function(left)
        else:
            a, left, at_left = left, right, at_right
            right = a + ratio * (b - a)
            at_right = function(right)
    return min((low, high, (a + b) / 2), key=function)


def _crossing(function: Callable[[float], float], value: float, inside: float, end: float) -> float:
    """The point between `inside`, where the function is at most `value`, and `end` where it begins to exceed it."""
    if function(end) <= value:
        return end
    for _ in range(200):
        middle = (inside + end) / 2
        if function(middle) <= value:
            inside = middle
        else:
            end = middle
    return inside


def _explain(
    allowed: dict[str, tuple[float, float]], limits: Limits, loss: float, smallest: float, least_flops: float
) -> Infeasible:
    """The error for an empty intersection: one limit that alone is too tight, or the pair that excludes each other."""
    alone = tuple(name for name, (low, high) in allowed.items() if low > high)
    words = {
        "parameters": f"parameters <= {limits.parameters:.3g} (at least {smallest:.3g} are needed)",
        "tokens": f"tokens <= {limits.tokens:.3g}",
        "flops": f"flops <= {limits.flops:.3g} (at least {least_flops:.3g} are needed)",
    }
    binding = alone
    if not alone:
        names = list(allowed)
        pairs = [(one, two) for i, one in enumerate(names) for two in names[i + 1 :]]
        binding = next(
            pair for pair in pairs if max(allowed[name][0] for name in pair) > min(allowed[name][1] for name in pair)
        )
    listed = " together with ".join(words[name] for name in binding)
    return Infeasible(f"loss {loss:.4f} cannot be reached with {listed}: relax it, or aim lower", binding)
