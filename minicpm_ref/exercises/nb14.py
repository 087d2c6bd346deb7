"""Checkers of 14_ultraclean: a share that is one, bands and rows for a purpose, and evidence of contamination."""

from __future__ import annotations

from collections.abc import Callable

import torch

from minicpm_ref.exercises import attempt
from minicpm_ref.ultraclean import Contamination, candidate_probability
from minicpm_ref.ultraclean.filters import Measured, repeated_lines

ITEM = "write a function that returns the sum of all even numbers in a list and ignores every word that is not a number"


def check_repeated_share(repeated_share: Callable[[str], float]) -> str:
    """Check `repeated_share(text)`: share of the characters that stand in lines which occurred before."""

    def check() -> None:
        for text in ("", "\n\n", "one\ntwo\n"):
            assert repeated_share(text) == 0, f"{text!r} repeats nothing: expected 0"
        found = repeated_share("hello world\nhello world\n")
        assert found != 22 / 24, "the first copy repeats nothing: count the later ones"
        assert found <= 1, f"a share of {found:.3g}: above and below, count the same unit, line breaks included or not"
        assert abs(found - 11 / 24) < 1e-9, f"expected 11/24, got {found:.4g}"
        text = "a = 1\n  a = 1\n\n\nb = 2\na = 1"
        expected = repeated_lines(Measured(text))
        found = repeated_share(text)
        assert abs(found - expected) < 1e-9, f"{text!r}: expected {expected:.4g}; blanks at the ends do not count"

    return attempt("repeated_share", check)


def check_choose_bands(choose_bands: Callable[[int, float, float, float], tuple[int, int]]) -> str:
    """Check `choose_bands(permutations, alike, unlike, allowed)`: (bands, rows) of the best recall at `alike`."""

    def probability(value: float, bands: int, rows: int) -> float:
        return candidate_probability(torch.tensor(value, dtype=torch.float64), bands, rows).item()

    def check() -> None:
        for permutations, alike, unlike, allowed in ((112, 0.8, 0.5, 0.06), (128, 0.8, 0.4, 0.01), (64, 0.9, 0.7, 0.5)):
            bands, rows = choose_bands(permutations, alike, unlike, allowed)
            where = f"{permutations} permutations, {bands} bands of {rows}"
            assert bands * rows <= permutations, f"{where}: more than there are"
            noise = probability(unlike, bands, rows)
            assert noise <= allowed, f"{where}: {noise:.3g} of the pairs at {unlike} are looked at, allowed {allowed}"
            best = max(
                probability(alike, b, r)
                for r in range(1, permutations + 1)
                for b in range(1, permutations // r + 1)
                if probability(unlike, b, r) <= allowed
            )
            found = probability(alike, bands, rows)
            assert found >= best - 1e-12, f"{where}: finds {found:.3f} at {alike}, and {best:.3f} can be had"

    return attempt("choose_bands", check)


def check_contamination(contamination: Callable[[str, str, int], float]) -> str:
    """Check `contamination(item, document, n)`: share of the item's word n-grams that the document holds."""

    def check() -> None:
        words = ITEM.split()
        padding = " ".join(f"filler{i}" for i in range(300))
        wrapped = "\n".join(" ".join(words[i : i + 6]) for i in range(0, len(words), 6))
        documents = {
            "the item alone": ITEM,
            "the item in capitals": ITEM.upper() + "!",
            "the item rewrapped to six words a line": wrapped,
            "the item inside a long text": f"{padding} {ITEM} {padding}",
            "half of the item": " ".join(words[:17]),
            "something else": padding,
        }
        for name, document in documents.items():
            match = Contamination([("item", ITEM)], limit=0).match(document)
            expected = match.score if match else 0.0
            found = contamination(ITEM, document, 13)
            assert abs(found - expected) < 1e-9, f"{name}: expected {expected:.3g}, got {found:.3g}"
        short = "one two three four five six seven eight"
        found = contamination(short, f"so {short} nine", 13)
        assert found == 1, f"an item shorter than n matches as a whole: expected 1, got {found}"

    return attempt("contamination", check)
