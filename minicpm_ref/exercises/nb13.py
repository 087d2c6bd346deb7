"""Checkers of 13_wind_tunnel: the compute-optimal ratio, an inverted sigmoid, the fewest parameters that suffice."""

from __future__ import annotations

import math
from collections.abc import Callable

from minicpm_ref.exercises import attempt

LAW = {"a": 406.4, "alpha": 0.34, "b": 410.7, "beta": 0.28}
FLOOR = 1.69


def _loss(n: float, d: float) -> float:
    return LAW["a"] * n ** -LAW["alpha"] + LAW["b"] * d ** -LAW["beta"] + FLOOR


def check_tokens_per_parameter(tokens_per_parameter: Callable[..., float]) -> str:
    """Check `tokens_per_parameter(flops, a, alpha, b, beta)`: D / N of the best use of `flops` = 6 N D."""

    def check() -> None:
        for flops in (1e18, 1e21, 1e24):
            found = tokens_per_parameter(flops, **LAW)
            assert found > 0, f"expected a positive ratio, got {found}"
            n = math.sqrt(flops / 6 / found)
            assert not math.isclose(found * 6, _best(flops / 6), rel_tol=1e-3), "6 N D, not N D: divide by 6 first"
            assert not math.isclose(1 / found, _best(flops), rel_tol=1e-3), "that is N / D: turn it over"
            here = _loss(n, flops / 6 / n)
            for other in (n * 0.97, n * 1.03):
                assert here <= _loss(other, flops / 6 / other), (
                    f"{flops:.0e} FLOPs: with {other:.3g} parameters the loss is lower than with your {n:.3g}"
                )
        symmetric = tokens_per_parameter(6e12, a=10.0, alpha=0.3, b=10.0, beta=0.3)
        assert math.isclose(symmetric, 1), f"equal terms share equally: the ratio is 1, got {symmetric:.3g}"

    return attempt("tokens_per_parameter", check)


def _best(flops: float) -> float:
    """D / N at the optimum."""
    total = LAW["alpha"] + LAW["beta"]
    n = (LAW["alpha"] * LAW["a"] / (LAW["beta"] * LAW["b"])) ** (1 / total) * (flops / 6) ** (LAW["beta"] / total)
    return flops / 6 / n**2


def check_loss_for(loss_for: Callable[..., float]) -> str:
    """Check `loss_for(score, floor, ceiling, slope, middle)`: the loss at which a sigmoid takes `score`."""

    def check() -> None:
        assert math.isclose(loss_for(0.6, 0.25, 0.95, 3.0, 1.5), 1.5), (
            "half way between floor and ceiling is the middle"
        )
        for loss in (0.5, 1.2, 2.9):
            for floor, ceiling in ((0.25, 0.9), (0.0, 1.0)):
                score = floor + (ceiling - floor) / (1 + math.exp(3.0 * (loss - 1.5)))
                found = loss_for(score, floor, ceiling, 3.0, 1.5)
                assert not math.isclose(found, 3 - loss, rel_tol=1e-6), (
                    "a better score needs a lower loss, not a higher"
                )
                assert math.isclose(found, loss, rel_tol=1e-6), f"score {score:.4f}: expected {loss}, got {found:.4f}"

    return attempt("loss_for", check)


def check_fewest_parameters(fewest_parameters: Callable[..., float]) -> str:
    """Check `fewest_parameters(loss, tokens, a, alpha, b, beta, floor)`: the least N that reaches `loss` on `tokens`
    tokens; infinity when no N does."""

    def check() -> None:
        for n, d in ((1e8, 1e10), (7e9, 2e11), (1e6, 1e9)):
            found = fewest_parameters(_loss(n, d), d, **LAW, floor=FLOOR)
            assert math.isclose(found, n, rel_tol=1e-6), f"expected {n:.3g}, got {found:.3g}"
        found = fewest_parameters(_loss(1e8, math.inf), math.inf, **LAW, floor=FLOOR)
        assert math.isclose(found, 1e8, rel_tol=1e-6), f"endless tokens still need parameters: 1e8, got {found:.3g}"
        found = fewest_parameters(FLOOR + 0.1, 1e9, **LAW, floor=FLOOR)
        assert found == math.inf, f"a billion tokens never teach this: expected infinity, got {found}"

    return attempt("fewest_parameters", check)
