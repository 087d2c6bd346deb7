"""The speeds in the tour's table are tokens over the seconds they took, by a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minicpm_ref import tour


def test_speeds_are_tokens_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    passes: list[float] = [9.0, 2.0, 4.0, 3.0]  # seconds of a prompt; the first run warms up and does not count

    def begin() -> Callable[[Tensor], Tensor]:
        prompt = passes.pop(0)

        def forward(ids: Tensor) -> Tensor:
            nonlocal now
            now += prompt if ids.shape[1] > 1 else prompt / 100
            return torch.zeros(1, ids.shape[1], 5)

        return forward

    monkeypatch.setattr(tour, "clock", lambda: now)
    prefill, decode = tour.median_speeds(begin, torch.zeros(1, 48, dtype=torch.long))
    assert prefill == pytest.approx(48 / 3)
    assert decode == pytest.approx(100 / 3)
    assert not passes


def test_a_step_is_timed_by_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    now, seconds = 0.0, [9.0, 1.0, 5.0, 2.0]

    def action() -> None:
        nonlocal now
        now += seconds.pop(0)

    monkeypatch.setattr(tour, "clock", lambda: now)
    assert tour.median_seconds(action) == 2.0
