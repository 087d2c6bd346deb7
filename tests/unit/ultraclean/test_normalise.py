"""Normalisation: what the classifier sees, and that scripts with meaningful marks keep them."""

from __future__ import annotations

import pytest

from minicpm_ref.checkpoint import EMBEDDED
from minicpm_ref.tokenizer import Tokenizer
from minicpm_ref.ultraclean.normalise import classifier_lines, normalise, strip_diacritics, words_of


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(EMBEDDED / "base" / "tokenizer.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\u00e9", "e"),
        ("e\u0301", "e"),
        ("Vi\u1ec7t", "Viet"),
        ("\u0915\u0941", "\u0915\u0941"),  # Hindi: the mark is a vowel
        ("\u304c", "\u304c"),  # Japanese "ga", not "ka"
        ("\u0439", "\u0439"),  # Russian "й", not "и"
        ("\ud55c", "\ud55c"),  # a Hangul syllable, not three jamo
        ("x\u00b2 10\u207b\u00b3 n\u00ba \u2026", "x\u00b2 10\u207b\u00b3 n\u00ba \u2026"),  # no compatibility forms
    ],
)
def test_marks_go_from_latin_letters_only(text: str, expected: str) -> None:
    assert strip_diacritics(text) == expected


def test_blanks_collapse_and_english_is_lowered() -> None:
    assert normalise("A  B\r\n\r\n \t\nC\tD\n") == "a b\nc\td"
    assert normalise("É Σ") == "e Σ"


def test_the_end_of_a_text_is_no_token(tokenizer: Tokenizer) -> None:
    texts = ["a b", "a b\n", "a b\r\n", "a\nb", "", " ", "a\u2028b", "a\x0bb\x00"]
    singly = [classifier_lines([text], tokenizer)[0] for text in texts]
    assert classifier_lines(texts, tokenizer) == singly
    assert singly[0] == singly[1] == singly[2] != singly[3]
    assert "\\n" in singly[3].split()
    assert singly[4] == singly[5] == ""
    assert not any(set(line) & set("\n\r\x0b\x00\u2028") for line in singly)


def test_a_label_in_the_text_is_text(tokenizer: Tokenizer) -> None:
    lines = classifier_lines(["see __label__spam here", "__label__good", "a,__label__bad b"], tokenizer)
    assert not any("label" in line for line in lines)


def test_words_know_neither_case_nor_punctuation() -> None:
    assert words_of("Hello,  WORLD\n你好! x_y") == ["hello", "world", "你", "好", "x", "y"]
    assert words_of("café CAFÉ") == ["café", "café"]
