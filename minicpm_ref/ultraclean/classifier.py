"""The quality classifier: fastText with the published settings, on balanced seeds, with a calibrated threshold.

The problem: what makes text good for training is not a rule, and asking a large model about 15T tokens costs thousands
of GPU hours. A linear classifier over bags of token n-grams costs less than a hundredth, and it is enough, if its seeds
are: the positives come from data that has verified (see `verify`), the negatives are random draws from raw pools.

A score is the probability of the good label, clipped to [0, 1] (fastText returns exp(log(p + 1e-5)), which is above 1
for a sure text). The published threshold is 0.5; ours is read off seeds that were kept out of training: the smallest
score from which on at least `precision` of them are good. One thread and a fixed seed train the same model twice; with
more threads fastText's updates race, and the classifier says that it is not repeatable.

Published settings: dimension 256, learning rate 0.1, word n-grams up to 3, minimum count 5, 3 epochs. Not published is
the number of hash buckets for the n-grams; fastText's default of two million would take 2 GB at dimension 256, which is
two hundred times the text of our seeds. Source: Ultra-FineWeb (arXiv 2505.05427) section 3.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_ref.files import replacing, write_text
from minicpm_ref.tokenizer import Tokenizer
from minicpm_ref.ultraclean.documents import sha256_of
from minicpm_ref.ultraclean.normalise import classifier_lines

GOOD, BAD = "__label__good", "__label__bad"


@dataclass(frozen=True)
class ClassifierSettings:
    """fastText's settings under its own meaning; `precision` is what the threshold is calibrated to."""

    dim: int = 256
    lr: float = 0.1
    word_ngrams: int = 3
    min_count: int = 5
    epochs: int = 3
    buckets: int = 100_000
    threads: int = 1
    seed: int = 0
    precision: float = 0.95
    kept_out: float = 0.2


class Classifier:
    """A trained classifier in a folder: `model.bin`, `tokenizer.json` and `classifier.json` (settings,
    threshold, hash).

    Raises ValueError if the model is not the one that the folder's record speaks of.
    """

    def __init__(self, folder: str | Path):
        import fasttext

        self.folder = Path(folder)
        self.record: dict[str, Any] = json.loads((self.folder / "classifier.json").read_text("utf-8"))
        self.sha256 = sha256_of(self.folder / "model.bin")
        if self.sha256 != self.record["sha256"]:
            raise ValueError(f"{self.folder / 'model.bin'} hashes to {self.sha256}: its record says otherwise")
        self.threshold: float = self.record["threshold"]
        self.tokenizer = Tokenizer.load(self.folder / "tokenizer.json")
        self._model = fasttext.load_model(str(self.folder / "model.bin"))

    def score(self, texts: Sequence[str]) -> list[float]:
        """The probability of being good, one for each text, in order."""
        return [_good(self._model, line) for line in classifier_lines(texts, self.tokenizer)]


def _good(model: Any, line: str) -> float:
    """Probability of GOOD for one line; fastText adds 1e-5, so it is clipped. A line without a known word gets 0.5."""
    labels, probabilities = model.predict(line, k=2)
    found = dict(zip(labels, map(float, probabilities), strict=True))
    return min(1.0, max(0.0, found.get(GOOD, 0.5 if not found else 0.0)))


def train_classifier(
    good: Sequence[str], bad: Sequence[str], tokenizer: Tokenizer, folder: str | Path, settings: ClassifierSettings
) -> Classifier:
    """Train on two lists of texts, cut to the shorter one's length, and write the classifier into `folder`.

    Every fifth pair (`kept_out`) is not trained on and sets the threshold. Raises ValueError for too few seeds, and if
    fastText saw other labels than the two or another number of seeds.
    """
    import fasttext

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = min(len(good), len(bad))
    stride = max(2, round(1 / settings.kept_out))
    if pairs < 2 * stride:
        raise ValueError(f"{len(good)} good and {len(bad)} bad seeds: expected at least {2 * stride} of each")
    lines = {GOOD: classifier_lines(good[:pairs], tokenizer), BAD: classifier_lines(bad[:pairs], tokenizer)}
    train = [f"{label} {lines[label][i]}" for i in range(pairs) if i % stride for label in (GOOD, BAD)]
    with replacing(folder / "train.txt") as temporary:
        temporary.write_text("".join(line + "\n" for line in train), "utf-8", newline="\n")
        model = fasttext.train_supervised(
            input=str(temporary), dim=settings.dim, lr=settings.lr, wordNgrams=settings.word_ngrams,
            minCount=settings.min_count, epoch=settings.epochs, bucket=settings.buckets, thread=settings.threads,
            seed=settings.seed, minCountLabel=1, verbose=0,
        )  # fmt: skip
    labels, counts = model.get_labels(include_freq=True)
    counted = {label: int(count) for label, count in zip(labels, counts, strict=True)}
    if counted != dict.fromkeys((GOOD, BAD), len(train) // 2):
        raise ValueError(f"fastText counted {counted}: expected {len(train) // 2} of each of {GOOD} and {BAD}")
    kept_out = [(_good(model, lines[label][i]), label == GOOD) for i in range(0, pairs, stride) for label in lines]
    threshold = calibrate(kept_out, settings.precision)
    with replacing(folder / "model.bin") as temporary:
        model.save_model(str(temporary))
    tokenizer.save(folder / "tokenizer.json")
    chosen = [is_good for value, is_good in kept_out if value >= threshold]
    record = {
        "settings": dataclasses.asdict(settings),
        "seeds": {"good": pairs, "bad": pairs, "sha256": _hash_of([*good[:pairs], *bad[:pairs]])},
        "repeatable": settings.threads == 1,
        "threshold": threshold,
        "kept_out": {
            "pairs": len(kept_out) // 2,
            "precision": sum(chosen) / len(chosen) if chosen else None,
            "recall": sum(chosen) / (len(kept_out) // 2),
        },
        "sha256": sha256_of(folder / "model.bin"),
    }
    write_text(folder / "classifier.json", json.dumps(record, indent=1) + "\n")
    return Classifier(folder)


def calibrate(scored: Sequence[tuple[float, bool]], precision: float) -> float:
    """The smallest score from which on at least `precision` of the texts are good; the published 0.5 if there is none.

    `scored` are (score, is good). Texts of one score stand or fall together.

    >>> calibrate([(0.9, True), (0.8, True), (0.7, False), (0.6, True)], 0.75)
    0.6
    """
    best, good = None, 0
    ordered = sorted(scored, reverse=True)
    for i, (value, is_good) in enumerate(ordered):
        good += is_good
        last_of_its_score = i + 1 == len(ordered) or ordered[i + 1][0] < value
        if last_of_its_score and good >= precision * (i + 1):
            best = value
    return 0.5 if best is None else best


def _hash_of(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()
