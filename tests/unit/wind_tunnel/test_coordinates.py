"""The coordinate check passes muP, fails the standard form, and catches each planted mistake."""

from __future__ import annotations

import pytest
import torch

from minicpm_ref.config import ModelConfig
from minicpm_ref.model import MiniCPM
from minicpm_ref.wind_tunnel import Candidate
from minicpm_ref.wind_tunnel.coordinates import Optimizers, coordinate_check, drifting, slopes, usual_optimizers

WIDTHS = (64, 128, 256, 512)
MUP = Candidate(64, 64, 0, 2.0**-8)
STANDARD = Candidate(64, 64, 0, 2.0**-8, "standard")


def test_mup_is_flat_and_the_standard_form_drifts() -> None:
    assert drifting(coordinate_check(MUP, WIDTHS)) == {}
    found = drifting(coordinate_check(STANDARD, WIDTHS))
    assert found["logits"] > 0.3
    assert "layer 2" in found


def rates_times(power: float) -> Optimizers:
    """The trainer's groups with the rate of the hidden matrices multiplied by (width / base)^power."""

    def build(model: MiniCPM, config: ModelConfig, candidate: Candidate) -> list[torch.optim.Optimizer]:
        optimizers = usual_optimizers(model, config, candidate)
        optimizers[-1].param_groups[1]["lr"] *= config.logit_divisor**power
        return optimizers

    return build


@pytest.mark.parametrize("power", [1, -1], ids=["rate not divided", "rate divided twice"])
def test_a_wrong_rate_is_caught(power: float) -> None:
    assert drifting(coordinate_check(MUP, WIDTHS[::3], seeds=(0,), optimizers=rates_times(power)))


@pytest.mark.parametrize("power", [1, -1], ids=["no logit factor", "logit factor twice"])
def test_a_wrong_logit_factor_is_caught(power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = MiniCPM.logits
    monkeypatch.setattr(MiniCPM, "logits", lambda self, x: right(self, x) * self.config.logit_divisor**power)
    assert "logits" in drifting(coordinate_check(MUP, WIDTHS[::3], seeds=(0,)))


def test_one_width_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 2"):
        slopes(coordinate_check(MUP, (64,), steps=1, seeds=(0,)))
