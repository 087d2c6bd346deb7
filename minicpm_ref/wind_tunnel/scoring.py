"""A model's answers to ScalingBench: the loss of each reference solution, and whether it was the likeliest option.

The prompt is read once into the cache; each option is then appended, measured and forgotten again. Lower is likelier:
bits of a whole option, not per token, so that options of one length in bytes but not in tokens compete fairly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minicpm_ref.cache import KVCache
from minicpm_ref.model import MiniCPM
from minicpm_ref.tokenizer import Tokenizer
from minicpm_ref.wind_tunnel.scaling_bench import Question
from minicpm_ref.wind_tunnel.sigmoid import Array, Scored


def solution_bytes(questions: Sequence[Question]) -> Array:
    """UTF-8 bytes of each reference solution, [questions] float64."""
    return np.array([len(question.solution.encode()) for question in questions], dtype=np.float64)


@torch.no_grad()
def answer(name: str, model: MiniCPM, tokenizer: Tokenizer, questions: Sequence[Question]) -> Scored:
    """What `model` makes of the questions."""
    bits, right = [], []
    for question in questions:
        each = option_bits(model, tokenizer, question)
        bits.append(each[question.answer])
        right.append(float(each.index(min(each)) == question.answer))
    return Scored(name, np.array(bits), np.array(right))


@torch.no_grad()
def option_bits(model: MiniCPM, tokenizer: Tokenizer, question: Question) -> list[float]:
    """-log2 p(option | prompt) of each option."""
    prompt = tokenizer.encode(question.prompt)
    options = [tokenizer.encode(option, add_bos=False) for option in question.options]
    capacity = len(prompt) + max(map(len, options))
    cache = KVCache(model.config, 1, capacity, model.device, model.dtype)
    first = model(_row(prompt, model), cache)[0, -1]  # [V], predicts the first token of every option
    length = cache.lengths.clone()
    result = []
    for ids in options:
        logits = first[None]
        if len(ids) > 1:
            logits = torch.cat([logits, model(_row(ids[:-1], model), cache)[0]])
            cache.truncate(length)
        log_p = torch.log_softmax(logits.float(), -1)
        result.append(-log_p[torch.arange(len(ids)), torch.tensor(ids)].sum().item() / math.log(2))
    return result


def _row(ids: Sequence[int], model: MiniCPM) -> Tensor:
    return torch.tensor([list(ids)], device=model.device)
