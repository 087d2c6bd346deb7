"""Reading texts longer than the training pieces, without training: rotary angles that stay where training has been.

Problem. RoPE turns every pair of a query and a key by an angle that grows with their distance. Fast pairs have gone
round many times within a training piece, so they have seen every angle. Slow ones have not: at a distance that training
never had, they reach angles for which the weights were never asked, and attention goes to arbitrary places.

Idea. Slow down those pairs alone. One that turns `often` times or more within the trained length is left as it is; one
that turns less than once is divided by `factor`, so that `factor` times the length stays within its known angles; in
between the speed is interpolated. Local order, which fast pairs carry, is untouched. LongRoPE's divisors say the same
thing with searched numbers, and the model has a place for them (`ModelConfig.rope_scaling`): nothing else changes.

Left out: YaRN's temperature on the logits, and fine-tuning, which every published long-context model has had.
Source: YaRN, arXiv 2309.00071, section 3.2 ("NTK-by-parts").
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from minicpm_ref.config import LongRope, ModelConfig
from minicpm_ref.model import MiniCPM, rope_frequencies


def stretched_rope(config: ModelConfig, trained_tokens: int, factor: float, often: float = 8.0) -> LongRope:
    """Divisors that let a model trained on pieces of `trained_tokens` read texts `factor` times as long.

    The same list stands for short and long texts, so no switch happens in the middle of one. Raises ValueError for
    lengths below 1, `factor` below 1, or `often` not above 1.
    """
    if trained_tokens < 1 or factor < 1 or often <= 1:
        raise ValueError(
            f"trained_tokens {trained_tokens}, factor {factor}, often {often}: expected at least 1, 1, and above 1"
        )
    plain = rope_frequencies(replace(config, rope_scaling=None), long=False)  # [D/2], radians a token
    turns = trained_tokens * plain / (2 * math.pi)
    keep = ((turns - 1) / (often - 1)).clamp(0, 1)
    divisors = tuple((1 / (keep + (1 - keep) / factor)).tolist())
    return LongRope(divisors, divisors, config.max_position_embeddings)


def with_config(model: MiniCPM, **changes: Any) -> MiniCPM:
    """The same weights, copied, under a config with some fields changed, such as `rope_scaling` or `sparse_config`.

    Raises RuntimeError when a change asks for weights of another shape.
    """
    changed = MiniCPM(replace(model.config, **changes)).to(model.device, model.dtype)
    changed.load_state_dict(model.state_dict())
    return changed.train(model.training)
