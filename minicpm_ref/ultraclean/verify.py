"""Efficient verification: is this data better than what we have? Ask a nearly trained model, not a new one.

The problem: whether data is good shows in the model that is trained on it, and training one from scratch for every
candidate costs more than the data is worth.
The idea: a model at the end of its stable phase sits at a high learning rate, and the decay that follows brings a large
part of the loss in a short time. Branch off there (`weights/stable`), decay on 70 % default and 30 % candidate data,
and compare with the same decay on 100 % default. Published cost for a 1B model: 110 GPU hours instead of 1,200.

Runs of one seed see the same default windows, so the comparison is paired: the gain of a seed is default minus
candidate, in held-out bits per byte. The rule, stated before looking: *verified* if the mean gain over the seeds is
above twice its standard error. A single seed has no error and is refused.

Source: Ultra-FineWeb (arXiv 2505.05427) section 2.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minicpm_ref.config import ModelConfig
from minicpm_ref.data import Corpus, small_sample
from minicpm_ref.evaluate import bits_per_byte
from minicpm_ref.files import replacing, write_text
from minicpm_ref.tokenizer import Tokenizer
from minicpm_ref.training import Recipe, Trainer, load_parent
from minicpm_ref.ultraclean.documents import sha256_of


@dataclass(frozen=True)
class AnnealRecipe(Recipe):
    """A decay that branches off `parent` on two sources: `share` of the rows come from the tokens of `candidate`."""

    candidate: str | None = None
    share: float = 0.3

    @cached_property
    def candidate_tokens(self) -> np.ndarray:
        """The candidate's token ids, mapped from the file."""
        assert self.candidate is not None
        tokens = np.memmap(self.candidate, dtype="<u2", mode="r")
        if len(tokens) <= self.context + 1:
            raise ValueError(f"{self.candidate}: {len(tokens)} tokens, expected more than a row of {self.context + 1}")
        return tokens

    def batch(self, corpus: Corpus, step: int, part: int, parts: int) -> tuple[Tensor, ...]:
        """Inputs and targets [rows, context]: the default rows of this seed and step, the last of them replaced."""
        inputs, targets = super().batch(corpus, step, part, parts)
        rows = round(self.share * len(inputs)) if self.candidate is not None else 0
        if rows:
            rng = np.random.default_rng((self.seed, step, 1 + part))
            starts = rng.integers(0, len(self.candidate_tokens) - self.context - 1, rows)
            windows = np.stack([self.candidate_tokens[s : s + self.context + 1] for s in starts]).astype(np.int64)
            inputs, targets = inputs.clone(), targets.clone()
            inputs[-rows:], targets[-rows:] = torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:])
        return inputs, targets


@dataclass(frozen=True)
class VerifySettings:
    """A verification: where it branches off, tokens of each decay, seeds, and how much held-out text judges it."""

    parent: str = "stable"
    tokens: int = 500_000
    context: int = 512
    batch_tokens: int = 8192
    share: float = 0.3
    seeds: tuple[int, ...] = (0, 1, 2)
    lr: float = 0.01
    matrix_lr: float = 0.02
    held_out_bytes: int = 200_000

    def recipe(self, config: ModelConfig, seed: int, candidate: Path | None) -> AnnealRecipe:
        """The decay of one seed; without a candidate, on the default data alone."""
        return AnnealRecipe(
            name="anneal", config=config, tokens=self.tokens, context=self.context, batch_tokens=self.batch_tokens,
            lr=self.lr, matrix_lr=self.matrix_lr, warmup_tokens=2 * self.batch_tokens, decay=0.9, seed=seed,
            parent=self.parent, candidate=None if candidate is None else str(candidate), share=self.share,
        )  # fmt: skip


@dataclass(frozen=True)
class Decision:
    """Mean gain over the seeds in bits per byte, its standard error, and whether the rule calls it verified."""

    gain: float
    error: float
    verified: bool
    default: list[float] = field(default_factory=list)
    candidate: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        verdict = "verified" if self.verified else "not verified"
        return f"gain {self.gain:+.4f} +- {self.error:.4f} bits per byte over {len(self.default)} seeds: {verdict}"


def decide(default: Sequence[float], candidate: Sequence[float]) -> Decision:
    """Judge paired results, one a seed, in bits per byte (lower is better).

    Raises ValueError unless there are at least two pairs.

    >>> str(decide([1.00, 1.02, 1.01], [0.98, 1.00, 0.98]))
    'gain +0.0233 +- 0.0033 bits per byte over 3 seeds: verified'
    """
    if len(default) != len(candidate) or len(default) < 2:
        raise ValueError(f"{len(default)} default and {len(candidate)} candidate results: expected pairs, at least two")
    gains = [d - c for d, c in zip(default, candidate, strict=True)]
    gain, error = statistics.mean(gains), statistics.stdev(gains) / math.sqrt(len(gains))
    return Decision(gain, error, gain > 2 * error, list(default), list(candidate))


def write_tokens(path: Path, texts: Iterable[str], tokenizer: Tokenizer, limit: int = 4_000_000) -> int:
    """Write ids (uint16) of the texts, each between <s> and </s>, until about `limit`; returns how many."""
    count = 0
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for text in texts:
            ids = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_ids[0]], dtype="<u2")
            ids.tofile(file)
            count += len(ids)
            if count >= limit:
                break
    return count


def default_corpus(folder: Path, texts: Iterable[str], like: Corpus, limit: int = 4_000_000) -> Corpus:
    """A corpus of `texts` to train on, with tokenizer and held-out documents of another one."""
    like.tokenizer.save(folder / "tokenizer.json")
    (folder / "held_out.jsonl").write_bytes((like.folder / "held_out.jsonl").read_bytes())
    tokens = write_tokens(folder / "train.bin", texts, like.tokenizer, limit)
    manifest = {"train_tokens": tokens, "train_sha256": sha256_of(folder / "train.bin")}
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    return Corpus(folder)


class Verifier:
    """Runs decays on `corpus` and keeps their results in `path`, so that none is trained twice, also after a kill.

    The default arm is shared by all candidates. Two candidates are the same if their tokens have the same hash.
    """

    def __init__(
        self, corpus: Corpus, settings: VerifySettings, path: Path, report: Callable[[str], None] = lambda line: None
    ):
        self.corpus, self.settings, self.path, self.report = corpus, settings, path, report
        head = {"settings": json.loads(json.dumps(asdict(settings))), "corpus": corpus.manifest_sha256}
        self.results: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {**head, "runs": {}}
        if {key: self.results[key] for key in head} != head:
            raise ValueError(f"{path}: made with other settings or another corpus; use another folder")
        self.texts = [document.text for document in small_sample(corpus.held_out, settings.held_out_bytes)]

    def verify(self, candidate: Path) -> Decision:
        """Decide about the candidate tokens in a file, training whatever has not been trained yet."""
        default = [self.bits(None, seed) for seed in self.settings.seeds]
        return decide(default, [self.bits(candidate, seed) for seed in self.settings.seeds])

    def bits(self, candidate: Path | None, seed: int) -> float:
        """Held-out bits per byte after the decay of one seed."""
        key = f"{'default' if candidate is None else sha256_of(candidate)[:16]} seed {seed}"
        if key not in self.results["runs"]:
            begin = time.monotonic()
            value = self._train(candidate, seed)
            self.results["runs"][key] = {"bits_per_byte": value, "seconds": round(time.monotonic() - begin, 1)}
            write_text(self.path, json.dumps(self.results, indent=1) + "\n")
            self.report(f"{key}: {value:.4f} bits per byte")
        return float(self.results["runs"][key]["bits_per_byte"])

    def _train(self, candidate: Path | None, seed: int) -> float:
        recipe = self.settings.recipe(load_parent(self.settings.parent).config, seed, candidate)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(recipe, self.corpus, folder)
            for _ in range(recipe.steps):
                trainer.train_step()
            return bits_per_byte(trainer.whole_model(), self.corpus.tokenizer, self.texts, recipe.context)
