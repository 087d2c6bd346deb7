"""The draft head of the embedded base: EAGLE-3 with a training-time test of seven steps.

The texts are the base's own continuations of its corpus (`continuations`), the vocabulary the tokens that occur in them
(`vocabulary`). Most of the run unrolls two steps only, which cost a third of seven and teach most of what there is; the
last part unrolls all seven, so that the head meets its own states. A target of four layers has no default streams: the
head sees those after its first, second and last layer.

What is stored is the head alone, in the published layout; the card holds the hash of the weights that it was made for.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from minicpm_ref.checkpoint import sha256_file
from minicpm_ref.data import Corpus, small_sample
from minicpm_ref.files import write_text
from minicpm_ref.machine import machine
from minicpm_ref.sampling import SamplingParams
from minicpm_ref.speculative import (
    DraftHead,
    HeadDrafter,
    Tally,
    count_tokens,
    coverage,
    frequent_tokens,
    save_head,
    speculate,
)
from minicpm_ref.training.card import parent_record
from minicpm_ref.training.continuations import Continuations
from minicpm_ref.training.optimizers import Muon
from minicpm_ref.training.recipe import Recipe
from minicpm_ref.training.recipes.base import CONFIG
from minicpm_ref.training.trainer import Trainer
from minicpm_ref.training.training_time_test import STEP_DECAY, TrainingTimeTest, fresh_head

SHAPES = {"chain of 4": (1, 4, 4), "tree of 8": (3, 4, 7), "tree of 32": (6, 6, 31)}  # width, depth, drafts


@dataclass(frozen=True)
class HeadRecipe(Recipe):
    """Training of a head for the decoder `parent`, whose `config` this is.

    `rows` continuations of `context` tokens behind `prompt` tokens of the corpus; the last `held_rows` of them are not
    trained on. `layers`: the streams the head sees. `unrolled` steps at the end, `shallow` ones for the first
    `shallow_share` of the run.
    """

    layers: tuple[int, ...] = (1, 2, 4)
    draft_vocab_size: int = 1024
    rows: int = 960
    held_rows: int = 96
    prompt: int = 64
    unrolled: int = 7
    shallow: int = 2
    shallow_share: float = 0.6

    @property
    def target_folder(self) -> str:
        """The parent's name, which a head always has."""
        if self.parent is None:
            raise ValueError("parent = None: a head drafts for a decoder, name it")
        return self.parent

    def texts(self, corpus: Corpus) -> NDArray[np.uint16]:
        """The target's continuations [rows, context]; made beside the corpus if they are not there yet."""
        return _texts(self, corpus.folder)

    def vocabulary(self, corpus: Corpus) -> Tensor:
        """The most frequent tokens of what the target wrote, its end ids among them, [draft_vocab_size]."""
        counts = count_tokens([self.written(corpus)], self.config.vocab_size)
        return frequent_tokens(counts, self.draft_vocab_size, [self.config.bos_token_id, *self.config.eos_token_id])

    def written(self, corpus: Corpus) -> Tensor:
        """All tokens of the target in the rows that are trained on."""
        trained = self.texts(corpus)[: self.rows - self.held_rows, self.prompt :]
        return torch.from_numpy(trained.astype(np.int64).ravel())

    def batch(self, corpus: Corpus, step: int, part: int, parts: int) -> tuple[Tensor, ...]:
        """Texts [rows, context], which of their tokens the target wrote, and how many steps to unroll."""
        count = self.batch_tokens // self.context
        if count % parts:
            raise ValueError(f"{count} rows a step cannot be shared by {parts} processes")
        chosen = np.random.default_rng((self.seed, step)).integers(0, self.rows - self.held_rows, count)
        mine = chosen[part * count // parts : (part + 1) * count // parts]
        steps = self.shallow if step < self.shallow_share * self.steps else self.unrolled
        return *self.rows_at(corpus, mine), torch.tensor(steps)

    def rows_at(self, corpus: Corpus, places: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Texts and marks of some rows."""
        ids = torch.from_numpy(self.texts(corpus)[places].astype(np.int64))
        return ids, (torch.arange(self.context) >= self.prompt).expand(len(ids), -1)

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """Cross-entropy against the target, steps weighted by 0.8^i, in nats a row."""
        ids, written, steps = batch
        losses: Tensor = model(ids, written, int(steps)).losses
        return (losses * STEP_DECAY ** torch.arange(len(losses), device=losses.device)).sum()


@lru_cache(maxsize=1)
def _texts(recipe: HeadRecipe, folder: Path) -> NDArray[np.uint16]:
    corpus = Corpus(folder)
    record = parent_record(recipe.target_folder)
    assert record is not None
    settings = Continuations(recipe.rows, recipe.context, recipe.prompt, seed=recipe.seed)
    place = folder / f"continuations-{recipe.name}"
    return settings.build(recipe.build_model(), record["weights_sha256"], corpus, place, print)


class HeadTrainer(Trainer):
    """`Trainer` of a head: the same loop, state and resume; another model, measure and file."""

    recipe: HeadRecipe

    def _build_model(self) -> nn.Module:
        target = self.recipe.build_model()
        head = fresh_head(target, self.recipe.vocabulary(self.corpus), self.recipe.layers, self.recipe.seed)
        return TrainingTimeTest(head, target, self.recipe.unrolled)

    def _build_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices of the layer and `fc`, AdamW for the output matrix and the norms."""
        named = list(self.model.named_parameters())
        inner = [parameter for name, parameter in named if parameter.ndim == 2 and "lm_head" not in name]
        outer = [parameter for name, parameter in named if parameter.ndim != 2 or "lm_head" in name]
        muon = Muon(inner, lr=self.recipe.matrix_lr, weight_decay=self.recipe.weight_decay)
        adam = torch.optim.AdamW(outer, lr=self.recipe.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"]
        return [muon, adam]

    @torch.no_grad()
    def _evaluate(self, console: Console) -> dict[str, float]:
        """Acceptance of a sampled guess after 0, 1, ... guesses before it, on texts that were not trained on."""
        if self.part > 0:
            return {}
        recipe = self.recipe
        ids, written = recipe.rows_at(self.corpus, np.arange(recipe.rows - min(recipe.held_rows, 16), recipe.rows))
        found = cast(TrainingTimeTest, self.model)(ids.to(self.device), written.to(self.device)).acceptance
        return {f"acceptance_{step}": round(value, 4) for step, value in enumerate(found.tolist())}

    def _finish(self, console: Console) -> dict[str, Any] | None:
        if self.part > 0:
            return None
        recipe, test = self.recipe, cast(TrainingTimeTest, self.model)
        head = test.head.requires_grad_(False).eval()
        folder = self.folder / "model"
        save_head(head, folder)
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        counts = count_tokens([recipe.written(self.corpus)], recipe.config.vocab_size)
        card = {
            "recipe": recipe.to_dict(),
            "parent": parent_record(recipe.parent),
            "parameters": sum(parameter.numel() for parameter in head.parameters()),
            "tokens": recipe.steps * recipe.batch_tokens,
            "corpus": {"manifest_sha256": self.corpus.manifest_sha256},
            "machine": machine(self.device),
            "precision": self.precision,
            "seconds": round(self.seconds, 1),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "vocabulary": str(coverage(counts, head.vocabulary.cpu())),
            "acceptance": {key: rows[-1][key] for key in rows[-1] if key.startswith("acceptance")},
            "acceptance_length": measure(head, recipe, self.corpus),
            "loss_curve": [[row["tokens"], round(row["loss"], 4)] for row in rows[:: max(1, len(rows) // 200)]],
            "weights_sha256": sha256_file(folder / "model.safetensors"),
        }
        write_text(folder / "card.json", json.dumps(card, indent=1))
        console.print(f"tokens a verification: {card['acceptance_length']}")
        return card


def measure(
    head: DraftHead, recipe: HeadRecipe, corpus: Corpus, prompts: int = 12, tokens: int = 64
) -> dict[str, dict[str, float]]:
    """Tokens a verification on held-out files, {shape: {temperature: tau}}: the second hundred tokens of each file is
    the prompt."""
    from minicpm_ref.engine import TorchExecutor  # a room of the same floor: needed to measure, not to train

    executor = TorchExecutor(recipe.build_model().eval(), max_length=512, capture_layers=head.layers)
    documents = small_sample(corpus.held_out, 200_000)[:prompts]
    found: dict[str, dict[str, float]] = {}
    for name, (width, depth, nodes) in SHAPES.items():
        for temperature in (0.0, 0.7):
            tally = Tally()
            for document in documents:
                prompt = corpus.tokenizer.encode(document.text)[100:200]
                params = SamplingParams(temperature, top_p=0.9, seed=0)
                drafter = HeadDrafter(head, width, depth, nodes)
                for _ in speculate(executor, drafter, prompt, tokens, params, recipe.config.eos_token_id, tally=tally):
                    pass
            found.setdefault(name, {})[str(temperature)] = round(tally.acceptance_length, 3)
    return found


TRAINER = HeadTrainer
RECIPE = HeadRecipe(
    name="eagle3",
    config=CONFIG,
    tokens=560_000,
    context=256,
    batch_tokens=1024,
    lr=0.002,
    matrix_lr=0.015,
    weight_decay=0.0,
    warmup_tokens=10_000,
    decay=0.4,
    parent="base",
)
