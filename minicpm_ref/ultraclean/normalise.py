"""Text normalisation before the classifier, as published: what a document looks like must not decide how good it is.

The problem: a classifier on words learns whatever tells good seeds from bad ones, also line ends, accents and capitals.
The idea: blank lines and runs of spaces collapse, Latin letters lose their diacritics, English becomes lower case, and
the text is cut into tokens of a byte-pair vocabulary instead of words between spaces, so that Chinese and code are cut
as finely as English. Line breaks and tabs stay, as tokens.

Two traps. Combining marks are not decoration everywhere: stripping all of them takes vowels from Hindi, turns the
Japanese "ga" into "ka" and the Russian "й" into "и"; only marks after a Latin letter go. And fastText reads its input
by lines and blanks, and takes any word with its label prefix for a label; so the words here are the *numbers* of the
tokens, which can be neither.

This form feeds the classifier and nothing else: documents are kept as they came.
Sources: Ultra-FineWeb (arXiv 2505.05427) section 3; google-research/bert#138 (the marks).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from minicpm_ref.tokenizer import Tokenizer

_LATIN_MARKS = re.compile(r"([A-Za-z\u00c0-\u024f\u1e00-\u1eff])[\u0300-\u036f]+")
_CAPITALS = re.compile(r"[A-Z]+")
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
_SPACES = re.compile(r"[ \u00a0]{2,}")
_BREAKS = re.compile(r"([\n\t\r])")
_BREAK_WORDS = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
# a word: one Chinese or Japanese character, or a run of letters and digits of any other script
_HAN = r"\u2e80-\u2fdf\u3005-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORDS = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+")
_ASCII_WORDS = re.compile(r"[a-z0-9]+")


def strip_diacritics(text: str) -> str:
    """Without the combining marks of Latin letters, in composed form (NFC); other scripts keep theirs.

    >>> strip_diacritics("café, Việt, が, й")
    'cafe, Viet, が, й'
    """
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", _LATIN_MARKS.sub(r"\1", unicodedata.normalize("NFD", text)))


def normalise(text: str) -> str:
    """The text as the classifier sees it; what stands at its ends, such as a last line break, changes nothing."""
    text = strip_diacritics(text.replace("\r\n", "\n"))
    text = text.lower() if text.isascii() else _CAPITALS.sub(lambda run: run[0].lower(), text)
    return _SPACES.sub(" ", _BLANK_LINES.sub("\n", text)).strip()


def classifier_lines(texts: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """One line for fastText a text: the numbers of its tokens, with \\n, \\t and \\r as words of their own.

    The same function serves training and prediction. A line holds no break, whatever the text holds.
    """
    pieces: list[str] = []
    layout: list[list[str | int]] = []  # words, and indices of pieces
    for text in texts:
        words: list[str | int] = []
        for part in _BREAKS.split(normalise(text)):
            if part in _BREAK_WORDS:
                words.append(_BREAK_WORDS[part])
            elif part:
                words.append(len(pieces))
                pieces.append(part)
        layout.append(words)
    encoded = tokenizer.encode_batch(pieces)
    return [
        " ".join(word if isinstance(word, str) else " ".join(map(str, encoded[word])) for word in words)
        for words in layout
    ]


def words_of(text: str) -> list[str]:
    """The words that duplicates and overlaps are counted in: without case, punctuation, spaces and line ends.

    A Chinese or Japanese character is a word; of other scripts, a run of letters and digits is one.

    >>> words_of("Hello,  WORLD 你好")
    ['hello', 'world', '你', '好']
    """
    if text.isascii():  # four times as fast
        return _ASCII_WORDS.findall(text.lower())
    return _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())
