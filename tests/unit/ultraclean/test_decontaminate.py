"""Decontamination: an item is found wherever it stands, and only from the limit on."""

from __future__ import annotations

import random
import textwrap

import pytest

from minicpm_ref.ultraclean.decontaminate import Contamination
from minicpm_ref.ultraclean.planted import WORDS

RNG = random.Random(0)
ITEM = " ".join(f"{RNG.choice(WORDS)}{i}" for i in range(60)) + "."
FILLER = " ".join(RNG.choice(WORDS) for _ in range(500))


@pytest.mark.parametrize(
    "text",
    [
        ITEM,
        textwrap.fill(ITEM, 50),
        "\n".join(" ".join(ITEM.split()[i : i + 8]) for i in range(0, 60, 8)),
        ITEM.upper().replace(" ", "  ") + "!?",
        f"{FILLER} {ITEM} {FILLER}",
    ],
)
def test_an_item_copied_whole_is_found_wherever_it_stands(text: str) -> None:
    match = Contamination([("task 1", ITEM)]).match(text)
    assert match is not None
    assert (match.item, match.score) == ("task 1", 1.0)
    assert len(match.ngram.split()) == 13
    assert match.ngram in " ".join(ITEM.lower().replace(".", "").split())


def test_no_ngram_runs_from_one_text_into_the_next() -> None:
    words = ITEM.split()
    items = Contamination([("head", " ".join(words[:12])), ("tail", " ".join(words[48:]))], limit=0.01)
    assert items.match(" ".join(words[12:48])) is None
    whole = Contamination([("task", " ".join(words[:20]))], limit=0.01)
    assert whole.match(" ".join(words[:12])) is None
    assert whole.match(" ".join(words[8:20])) is None


def test_short_items_match_as_a_whole_and_shorter_ones_are_listed() -> None:
    items = Contamination([("nine", "one two three four five six seven eight nine"), ("two", "hello world")])
    assert items.too_short == ["two"]
    assert items.match("hello world, one two three four five six seven eight ten") is None
    match = items.match("so: one two three four five six seven eight nine ten")
    assert match is not None
    assert (match.item, match.score) == ("nine", 1.0)


@pytest.mark.parametrize("limit", [0.0, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.85, 1.0])
def test_flagged_if_and_only_if_the_score_reaches_the_limit(limit: float, overlap: float) -> None:
    item = ITEM.split()[:32]  # 20 n-grams
    held = round(20 * overlap)
    text = " ".join(item[: held + 12] if held else ["unrelated"] * 30)
    match = Contamination([("task", " ".join(item))], limit).match(text)
    assert (match is not None) == (overlap > 0 and overlap >= limit)
    assert match is None or match.score == overlap


def test_a_passage_of_a_long_item_is_enough() -> None:
    rng = random.Random(3)
    words = [f"{rng.choice(WORDS)}{i}" for i in range(1000)]
    match = Contamination([("file.py", " ".join(words))]).match(" ".join(words[390:620]))
    assert match is not None
    assert match.item == "file.py (passage 3 of 5)"
    with pytest.raises(ValueError, match="limit = 1.5"):
        Contamination([], limit=1.5)
