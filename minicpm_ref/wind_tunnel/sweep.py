"""A first wind-tunnel sweep: choose shape and learning rate by training many tiny models.

Under muP the best learning rate barely moves with width, so it can be searched on a model a quarter as wide and used on
the real one. The sweep has two parts: learning rates on a narrow proxy, then shapes of the real size at the rate found.
Every run sees the same tokens in the same order. What decides between shapes is the loss after equal *time*, so each
run's speed is recorded too.

Run it with `python -m minicpm_ref.wind_tunnel.sweep CORPUS OUT.json`; finished runs are kept when it is interrupted.
Source: MiniCPM, arXiv 2404.06395 section 3.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minicpm_ref.config import ModelConfig
from minicpm_ref.data import Corpus, small_sample
from minicpm_ref.evaluate import bits_per_byte
from minicpm_ref.files import write_text
from minicpm_ref.machine import machine
from minicpm_ref.training import Recipe, Trainer


@dataclass(frozen=True)
class Shape:
    """Width, depth, heads, key-value heads and SwiGLU width of a candidate."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int

    def config(self, vocab_size: int = 4096) -> ModelConfig:
        """The untied model of this shape."""
        return ModelConfig(
            vocab_size, self.hidden, self.layers, self.heads, self.kv_heads, self.ffn, max_position_embeddings=4096
        )


PROXY = Shape(128, 4, 4, 1, 384)
SHAPES = (
    Shape(256, 4, 4, 1, 768),
    Shape(256, 4, 8, 2, 768),
    Shape(256, 6, 8, 2, 512),
    Shape(512, 2, 8, 2, 1024),
)


def measure(recipe: Recipe, corpus: Corpus, texts: list[str]) -> dict[str, object]:
    """Train `recipe` in a scratch folder; returns settings, final loss, held-out bits per byte and tokens/s."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, corpus, folder)
        begin = time.monotonic()
        losses = [trainer.train_step()["loss"] for _ in range(recipe.steps)]
        seconds = time.monotonic() - begin
        tail = losses[-max(1, len(losses) // 10) :]
        return {
            "recipe": recipe.to_dict(),
            "parameters": recipe.config.num_parameters(),
            "loss": round(sum(tail) / len(tail), 4),
            "held_out_bits_per_byte": round(
                bits_per_byte(trainer.whole_model(), corpus.tokenizer, texts, recipe.context), 4
            ),
            "tokens_per_second": round(recipe.tokens / seconds),
        }


def sweep(corpus: Corpus, out: Path) -> dict[str, object]:
    """Run both parts, writing `out` after every run; runs already in `out` are not repeated."""
    result: dict[str, object] = json.loads(out.read_text("utf-8")) if out.exists() else {}
    runs: dict[str, dict] = result.setdefault("runs", {})  # type: ignore[assignment]
    result |= machine(torch.device("cpu")) | {
        "versions": {"torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "settings": {"corpus_manifest_sha256": corpus.manifest_sha256, "vocab_size": corpus.tokenizer.vocab_size},
    }
    texts = [document.text for document in small_sample(corpus.held_out, 100_000)]

    def run(name: str, recipe: Recipe) -> float:
        if name not in runs:
            runs[name] = measure(recipe, corpus, texts)
            write_text(out, json.dumps(result, indent=1))
            print(name, {k: v for k, v in runs[name].items() if k != "recipe"}, flush=True)
        return runs[name]["held_out_bits_per_byte"]

    proxy = Recipe("proxy", PROXY.config(corpus.tokenizer.vocab_size), tokens=240_000, context=256)
    rates = {}
    for lr in (0.005, 0.01, 0.02, 0.04):
        for matrix_lr in (0.02, 0.04):
            rates[lr, matrix_lr] = run(f"muon lr {lr} matrix {matrix_lr}", replace(proxy, lr=lr, matrix_lr=matrix_lr))
    for lr in (0.005, 0.01, 0.02):
        run(f"adamw lr {lr}", replace(proxy, lr=lr, optimizer="adamw"))
    lr, matrix_lr = min(rates, key=lambda pair: rates[pair])
    for shape in SHAPES:
        name = f"shape {shape.hidden} x {shape.layers}, heads {shape.heads}/{shape.kv_heads}, ffn {shape.ffn}"
        config = shape.config(corpus.tokenizer.vocab_size)
        run(name, replace(proxy, config=config, tokens=320_000, lr=lr, matrix_lr=matrix_lr))
    result["chosen_rates"] = {"lr": lr, "matrix_lr": matrix_lr}
    write_text(out, json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    sweep(Corpus(sys.argv[1]), Path(sys.argv[2]))
