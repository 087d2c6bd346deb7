"""Cases of training: the schedule, Muon's orthogonalization, and bits per byte.

`WSD_FACTOR` walks the corners of the schedule: first and last step, both knees and their neighbours, no warmup, no
decay, and phases that overlap because the run is short.
`ORTHOGONALIZE` has wide, square and tall matrices, stacks of them, and one whose norm is as small as the constant that
guards the division. Most rows do one iteration: each further one magnifies a float32 rounding error up to 3.4 times,
as it does a small singular value.
`BITS_PER_BYTE` brings a tiny random model in float64 and a tiny real tokenizer, so that tokens, characters and bytes
are three different counts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from minicpm_ref.config import ModelConfig
from minicpm_ref.model import MiniCPM
from minicpm_ref.tokenizer import Tokenizer


@dataclass(frozen=True)
class WsdCase:
    """One row: `wsd_factor(step, steps, warmup_steps, decay_steps)`."""

    name: str
    step: int
    steps: int = 100
    warmup_steps: int = 10
    decay_steps: int = 30

    def build(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[int, int, int, int]:
        """(step, steps, warmup_steps, decay_steps)."""
        return self.step, self.steps, self.warmup_steps, self.decay_steps


@dataclass(frozen=True)
class OrthogonalizeCase:
    """One row: `orthogonalize(matrices, iterations)` with matrices [*shape] of normal numbers of size `scale`."""

    name: str
    shape: tuple[int, ...]
    iterations: int = 1
    scale: float = 1.0
    seed: int = 0

    def build(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[Tensor, int]:
        """(matrices [*shape], iterations), drawn in float32 on the CPU and then rounded to `dtype`."""
        generator = torch.Generator().manual_seed(self.seed)
        return (torch.randn(self.shape, generator=generator) * self.scale).to(device, dtype), self.iterations


@dataclass(frozen=True)
class BitsPerByteCase:
    """One row: `bits_per_byte(model, tokenizer, texts, context, batch_tokens)`."""

    name: str
    texts: tuple[str, ...]
    context: int = 512
    batch_tokens: int = 8192

    def build(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[MiniCPM, Tokenizer, tuple[str, ...], int, int]:
        """(model, tokenizer, texts, context, batch_tokens); the model is always float64 on the CPU."""
        model, tokenizer = _tiny_language_model()
        return model, tokenizer, self.texts, self.context, self.batch_tokens


@functools.cache
def _tiny_language_model() -> tuple[MiniCPM, Tokenizer]:
    words = "def return self import if not in for x and else is None the value of a list\n"
    tokenizer = Tokenizer.train([words, words], vocab_size=305, alphabet=30)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        dim_model_base=16,
        tie_word_embeddings=True,  # an output matrix of its own starts at zero, and uniform predictions hide mistakes
    )
    return MiniCPM(config).init_weights(0).double().eval(), tokenizer


WSD_FACTOR: tuple[WsdCase, ...] = (
    WsdCase("first-step", 0),
    WsdCase("warming-up", 4),
    WsdCase("warm-minus-1", 8),
    WsdCase("warm", 9),
    WsdCase("warm-plus-1", 10),
    WsdCase("stable", 50),
    WsdCase("decay-minus-1", 69),
    WsdCase("decay", 70),
    WsdCase("decay-plus-1", 71),
    WsdCase("half-way-down", 85),
    WsdCase("last-step", 99),
    WsdCase("no-warmup", 0, warmup_steps=0),
    WsdCase("no-decay", 99, decay_steps=0),
    WsdCase("one-step-warmup", 0, warmup_steps=1),
    WsdCase("one-step-run", 0, steps=1, warmup_steps=0, decay_steps=0),
    WsdCase("overlap-rising", 3, steps=12, warmup_steps=10, decay_steps=8),
    WsdCase("overlap-falling", 8, steps=12, warmup_steps=10, decay_steps=8),
    WsdCase("prime", 97, steps=101, warmup_steps=7, decay_steps=13),
)

ORTHOGONALIZE: tuple[OrthogonalizeCase, ...] = (
    OrthogonalizeCase("one-number", (1, 1)),
    OrthogonalizeCase("row", (1, 7)),
    OrthogonalizeCase("column", (7, 1)),
    OrthogonalizeCase("square", (8, 8)),
    OrthogonalizeCase("wide", (8, 24)),
    OrthogonalizeCase("tall", (24, 8)),
    OrthogonalizeCase("prime-both", (11, 29)),
    OrthogonalizeCase("stack", (3, 8, 16)),
    OrthogonalizeCase("stack-of-stacks", (2, 3, 16, 8)),
    OrthogonalizeCase("two-iterations", (8, 8), iterations=2),
    OrthogonalizeCase("no-iteration", (8, 24), iterations=0),
    OrthogonalizeCase("large", (8, 24), scale=1e4),
    OrthogonalizeCase("as-small-as-the-guard", (8, 24), scale=3e-8),
)

BITS_PER_BYTE: tuple[BitsPerByteCase, ...] = (
    BitsPerByteCase("one-character", ("x",)),
    BitsPerByteCase("one-line", ("def f(x):\n    return x\n",)),
    BitsPerByteCase("two-texts", ("if x in self", "import a list\n")),
    BitsPerByteCase("byte-fallback", ("# 小钢炮 é\n",)),
    BitsPerByteCase("short-windows", ("for x in a list: return None if x is not self",), context=8),
    BitsPerByteCase("window-of-one", ("return the value",), context=1),
    BitsPerByteCase("ragged-windows", ("def f(x): return x", "x", "import self"), context=5, batch_tokens=10),
)
