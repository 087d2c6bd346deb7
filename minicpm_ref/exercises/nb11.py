"""Checkers of 11_speculative_decoding: the law after a rejection, and how many tokens to draft."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from minicpm_ref.exercises import attempt
from minicpm_ref.speculative import acceptance_rate

Law = NDArray[np.float64]


def check_residual(residual: Callable[[Law, Law], Law]) -> str:
    """Check `residual(p, q)`: the law [V] that a token is drawn from after a draft of q was rejected by p."""

    def check() -> None:
        rng = np.random.default_rng(0)
        for size in (2, 3, 7):
            for _ in range(20):
                p, q = rng.dirichlet(np.full(size, 0.5), 2)
                found = np.asarray(residual(p.copy(), q.copy()))
                assert found.shape == (size,), f"shape {found.shape}, but there are {size} tokens"
                assert (found >= 0).all(), f"p = {p.round(2)}, q = {q.round(2)}: a probability below zero"
                assert np.isclose(found.sum(), 1), f"the probabilities add up to {found.sum():.3f}, not to 1"
                rate = acceptance_rate(p, q)
                emitted = np.minimum(p, q) + (1 - rate) * found
                assert np.allclose(emitted, p), (
                    f"p = {p.round(2)}, q = {q.round(2)}: accepted drafts and your law together emit "
                    f"{emitted.round(2)}, which is not p"
                )

    return attempt("residual", check)


def check_best_drafts(best_drafts: Callable[[float, float, float], int]) -> str:
    """Check `best_drafts(rate, verify, draft)`: the number of drafts, 0 to 32, that makes decoding fastest."""

    def check() -> None:
        for rate in (0.0, 0.3, 0.5, 0.7, 0.9, 1.0):
            for verify in (0.0, 0.05, 0.3, 1.0):
                for draft in (0.01, 0.1, 0.5):
                    speeds = [
                        sum(rate**i for i in range(count + 1)) / (1 + verify * count + draft * count)
                        for count in range(33)
                    ]
                    found, expected = best_drafts(rate, verify, draft), int(np.argmax(speeds))
                    assert 0 <= found <= 32, f"{found} drafts: expected 0 to 32"
                    assert np.isclose(speeds[found], speeds[expected]), (
                        f"acceptance {rate}, {verify} of a step a verified token and {draft} a draft: {found} drafts "
                        f"run at {speeds[found]:.2f} of plain decoding, {expected} at {speeds[expected]:.2f}"
                    )

    return attempt("best_drafts", check)
