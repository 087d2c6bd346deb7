"""Answers to the exercises of notebook 14, right and wrong."""

from __future__ import annotations

import re

from exercise_answers import Right, Wrong
from minicpm_ref.exercises import nb14


def repeated_share(text: str, copies: int = 1, whole: str = "characters") -> float:
    seen: set[str] = set()
    repeats = 0
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    for line in lines:
        if line in seen or (copies == 0 and lines.count(line) > 1):
            repeats += len(line)
        seen.add(line)
    below = len(text) if whole == "characters" else len(set(lines))
    return repeats / below if below else 0.0


def keeps_blanks(text: str) -> float:
    seen: set[str] = set()
    repeats = 0
    for line in text.split("\n"):
        repeats += len(line) if line in seen else 0
        seen.add(line)
    return repeats / len(text) if text else 0.0


def probability(value: float, bands: int, rows: int) -> float:
    return 1 - (1 - value**rows) ** bands


def choose_bands(permutations: int, alike: float, unlike: float, allowed: float) -> tuple[int, int]:
    pairs = [(permutations // rows, rows) for rows in range(1, permutations + 1)]
    pairs += [(bands, rows) for most, rows in pairs for bands in range(1, most)]
    quiet = [pair for pair in pairs if probability(unlike, *pair) <= allowed]
    return max(quiet, key=lambda pair: probability(alike, *pair))


def contamination(item: str, document: str, n: int) -> float:
    words, held = (re.findall(r"\w+", text.lower()) for text in (item, document))
    n = min(n, len(words))
    grams = {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
    return len(grams & {tuple(held[i : i + n]) for i in range(len(held) - n + 1)}) / len(grams)


def of_the_document(item: str, document: str, n: int) -> float:
    return contamination(document, item, n) if len(document.split()) >= n else 0.0


def line_by_line(item: str, document: str, n: int) -> float:
    return max(contamination(item, line, n) for line in document.split("\n"))


def with_capitals(item: str, document: str, n: int) -> float:
    return contamination(item, re.sub(r"[A-Z]", "?", document), n)


def only_long(item: str, document: str, n: int) -> float:
    return contamination(item, document, n) if len(item.split()) >= n else 0.0


RIGHT: list[Right] = [
    (nb14.check_repeated_share, repeated_share),
    (nb14.check_choose_bands, choose_bands),
    (nb14.check_contamination, contamination),
]

WRONG: dict[str, Wrong] = {
    "all copies": (nb14.check_repeated_share, lambda text: 2 * repeated_share(text), "the first copy"),
    "another unit": (nb14.check_repeated_share, lambda text: repeated_share(text, whole="lines"), "the same unit"),
    "blanks count": (nb14.check_repeated_share, keeps_blanks, "blanks at the ends"),
    "division by nothing": (nb14.check_repeated_share, lambda text: 1.0, "repeats nothing"),
    "too many": (nb14.check_choose_bands, lambda p, *_: (p, 2), "more than there are"),
    "too noisy": (nb14.check_choose_bands, lambda p, *_: (p, 1), "are looked at"),
    "timid": (nb14.check_choose_bands, lambda p, *_: (1, p), "can be had"),
    "share of the document": (nb14.check_contamination, of_the_document, "inside a long text|half of the item"),
    "line by line": (nb14.check_contamination, line_by_line, "rewrapped"),
    "capitals": (nb14.check_contamination, with_capitals, "capitals"),
    "short items never": (nb14.check_contamination, only_long, "matches as a whole"),
}
