"""Checkers of 02_training_real_weights: encoding with merges, the exponential decay of MiniCPM-1, and a step of
Muon."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models
from torch import Tensor, nn

from minicpm_ref.exercises import attempt
from minicpm_ref.training.optimizers import Muon


def check_encode_word(encode_word: Callable[[str, list[tuple[str, str]]], list[str]]) -> str:
    """Check `encode_word(word, merges)`: the symbols of a word under merges ordered from first to last learned."""

    def check() -> None:
        merges = [("e", "s"), ("es", "t"), ("l", "o"), ("lo", "w")]
        assert encode_word("lowest", merges) == ["low", "est"], "lowest: both merges of each half apply"
        assert encode_word("slot", merges) == ["s", "lo", "t"], "slot: only l + o applies"
        assert encode_word("x", merges) == ["x"], "a single character stays as it is"
        assert encode_word("aaaaa", [("a", "a")]) == ["aa", "aa", "a"], (
            "aaaaa: join from left to right, without overlap"
        )
        late = [("b", "c"), ("a", "b")]
        assert encode_word("abc", late) == ["a", "bc"], "abc: b + c was learned before a + b, so it comes first"
        draw = random.Random(0)
        merges = [
            ("a", "b"),
            ("b", "a"),
            ("c", "a"),
            ("ab", "ab"),
            ("ba", "c"),
            ("a", "a"),
            ("ab", "c"),
            ("abab", "ca"),
        ]
        vocabulary = {symbol: i for i, symbol in enumerate(["a", "b", "c", *("".join(pair) for pair in merges)])}
        library = Backend(models.BPE(vocab=vocabulary, merges=merges))
        for _ in range(200):
            word = "".join(draw.choices("abc", k=draw.randint(1, 12)))
            expected = library.encode(word).tokens
            found = encode_word(word, merges)
            assert found == expected, f"{word} under {merges}: expected {expected}, got {found}"

    return attempt("encode_word", check)


def check_half_life_factor(half_life_factor: Callable[[int, int, int, float], float]) -> str:
    """Check `half_life_factor(step, warmup_steps, decay_start, half_life)`."""

    def check() -> None:
        for step, expected in ((0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (80, 1.0), (100, 0.5), (120, 0.25)):
            found = half_life_factor(step, 10, 80, 20)
            assert math.isclose(found, expected), f"step {step}: expected {expected}, got {found}"
        assert math.isclose(half_life_factor(83, 0, 80, 4.5), 0.5 ** (3 / 4.5)), "the decay has no steps of its own"
        assert half_life_factor(0, 0, 80, 4.5) == 1, "without warmup the first step has the full rate"

    return attempt("half_life_factor", check)


def check_muon_update(
    muon_update: Callable[[Tensor, Tensor, Tensor, float, float, float], tuple[Tensor, Tensor]],
) -> str:
    """Check `muon_update(weight, gradient, buffer, lr, momentum, weight_decay)` against three steps of
    `minicpm_ref.training.optimizers.Muon`."""

    def check() -> None:
        generator = torch.Generator().manual_seed(0)
        for shape in ((6, 6), (4, 12), (12, 4)):
            parameter = nn.Parameter(torch.randn(shape, generator=generator))
            optimizer = Muon([parameter], lr=0.1, momentum=0.9, weight_decay=0.2)
            weight, buffer = parameter.detach().clone(), torch.zeros(shape)
            for step in range(3):
                gradient = torch.randn(shape, generator=generator)
                parameter.grad = gradient.clone()
                optimizer.step()
                arguments = (weight, gradient, buffer)
                copies = [tensor.clone() for tensor in arguments]
                weight, buffer = muon_update(*arguments, 0.1, 0.9, 0.2)
                assert all(map(torch.equal, arguments, copies)), "an argument was changed in place"
                theirs = optimizer.state[parameter]["momentum_buffer"]
                assert torch.allclose(buffer, theirs, atol=1e-5), f"shape {shape}, step {step}: the buffer differs"
                assert torch.allclose(weight, parameter, atol=1e-3), f"shape {shape}, step {step}: the weight differs"

    return attempt("muon_update", check)
