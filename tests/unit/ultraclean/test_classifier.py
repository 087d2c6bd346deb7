"""The classifier: scores that are probabilities, labels that are labels, repeatable, and its threshold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from minicpm_ref.checkpoint import EMBEDDED
from minicpm_ref.tokenizer import Tokenizer
from minicpm_ref.ultraclean.classifier import Classifier, ClassifierSettings, calibrate, train_classifier
from minicpm_ref.ultraclean.decontaminate import embedded_items
from minicpm_ref.ultraclean.planted import word_salad

SMALL = ClassifierSettings(dim=16, buckets=2000, min_count=1, epochs=40, lr=0.5)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(EMBEDDED / "base" / "tokenizer.json")


@pytest.fixture(scope="module")
def trained(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    good = [f"a good text about birds and trees {i}" for i in range(50)]
    bad = [f"buy cheap now click here {i} __label__good" for i in range(50)]
    return train_classifier(good, bad, tokenizer, tmp_path_factory.mktemp("classifier"), SMALL)


def test_the_published_settings_are_the_default() -> None:
    settings = ClassifierSettings()
    assert (settings.dim, settings.lr, settings.word_ngrams, settings.min_count, settings.epochs) == (256, 0.1, 3, 5, 3)


def test_scores_are_probabilities_and_one_a_document(trained: Classifier) -> None:
    texts = ["a good text about birds", "buy cheap now", "a b", "a b\n", "a b\r\n", "a\nb", "", " ", "__label__bad"]
    scores = trained.score(texts)
    assert len(scores) == len(texts)
    assert [trained.score([text])[0] for text in texts] == scores
    assert all(0 <= score <= 1 for score in scores)
    assert scores[0] > 0.9
    assert scores[1] < 0.1
    assert scores[2] == scores[3] == scores[4]
    assert scores[6] == scores[7]


def test_a_library_value_above_one_is_clipped() -> None:
    from minicpm_ref.ultraclean.classifier import BAD, GOOD, _good

    class Sure:
        def predict(self, line: str, k: int) -> tuple[tuple[str, str], list[float]]:
            return (GOOD, BAD), [1.00001, 0.00001]

    assert _good(Sure(), "anything") == 1.0


def test_the_label_set_is_exactly_two_and_the_counts_are_the_seeds(trained: Classifier) -> None:
    assert trained.record["seeds"]["good"] == trained.record["seeds"]["bad"] == 50
    assert trained.record["kept_out"]["pairs"] == 10
    assert trained.record["kept_out"]["precision"] >= 0.95


def test_one_thread_and_a_seed_train_the_same_model_twice(tokenizer: Tokenizer, tmp_path: Path) -> None:
    good = [text[:2000] for _, text in embedded_items(EMBEDDED / "held_out.jsonl")][:16]
    bad = [word_salad(text, i) for i, text in enumerate(good)]
    first, second = (train_classifier(good, bad, tokenizer, tmp_path / name, SMALL) for name in "ab")
    assert first.score(good + bad) == second.score(good + bad)
    assert first.sha256 == second.sha256
    assert first.record["repeatable"] is True
    racing = train_classifier(good, bad, tokenizer, tmp_path / "c", replace(SMALL, threads=2))
    assert racing.record["repeatable"] is False


def test_a_replaced_model_is_refused(trained: Classifier, tmp_path: Path) -> None:
    for path in trained.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert Classifier(tmp_path).sha256 == trained.sha256
    (tmp_path / "model.bin").write_bytes(b"another")
    with pytest.raises(ValueError, match="hashes to"):
        Classifier(tmp_path)


def test_too_few_seeds_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 good and 100 bad seeds"):
        train_classifier(["a"] * 3, ["b"] * 100, tokenizer, tmp_path, SMALL)


def test_the_threshold_is_the_smallest_that_keeps_the_precision() -> None:
    scored = [(0.9, True), (0.8, True), (0.7, False), (0.6, True), (0.5, False), (0.1, False)]
    assert calibrate(scored, 1.0) == 0.8
    assert calibrate(scored, 0.75) == 0.6
    assert calibrate([(0.9, False), (0.1, True)], 0.95) == 0.5
    assert calibrate([(0.9, True), (0.9, False)], 0.95) == 0.5, "texts of one score stand or fall together"
    assert json.dumps(calibrate(scored, 0.0)) == "0.1"
