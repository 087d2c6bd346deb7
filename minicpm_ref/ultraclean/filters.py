"""Rule filters: each is one number of a text with a limit, a name and a reason.

The problem: most junk needs no classifier. Minified scripts, tables of numbers, licences, menus and mojibake give
themselves away by a count. But a filter that nobody can read rejects in silence what it should not.
The idea: a rule measures one number and rejects a text whose number lies outside its limits; the rejection carries
the rule's name, the number and the limit, so that a person can disagree. The first rule that objects is the reason.

Every share is a part of the same unit that is counted below it, so it lies in [0, 1], and a share of nothing is 0. Code
and prose have other limits where symbols and repetition mean other things; which of the two a text is, is decided from
the text alone (`looks_like_code`), so that a document is judged alike from a folder and from a Parquet file.

The limits of prose follow Gopher (arXiv 2112.11446, appendix A1) and FineWeb (arXiv 2406.17557) where they have one;
those of code were set on the standard library. The share of repeated lines counts the repeats, not the first copy.

Left out: language identification, and lists of bad words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from minicpm_ref.ultraclean.normalise import words_of

INFINITY = float("inf")


class Measured:
    """A text with what the rules count, each computed once and only if a rule asks."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def lines(self) -> list[str]:
        """Lines that hold something, without blanks at their ends; only \\n and \\r\\n end a line."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def words(self) -> list[str]:
        """Words as duplicates are counted in: see `words_of`."""
        return words_of(self.text)

    @cached_property
    def lower(self) -> str:
        """The text in lower case with single blanks, for phrases that may be wrapped or in capitals."""
        return " ".join(self.tokens).lower()

    @cached_property
    def tokens(self) -> list[str]:
        """What stands between blanks."""
        return self.text.split()

    @cached_property
    def visible(self) -> int:
        """Characters that leave a mark: no blanks, no control or format characters."""
        characters = "".join(self.tokens)
        if characters.isascii():
            return len(characters) - len(_CONTROL.findall(characters))
        return sum(unicodedata.category(c)[0] != "C" for c in characters)


_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")  # tab, line end and form feed are layout
_DIGITS = re.compile(r"\d+")
_SYMBOLS = re.compile(r"[^\w\s]+|_+")
_LETTER = re.compile(r"[^\W\d_]")
_WIDE = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\uffef]+")  # scripts without blanks between words
_CODE_LINE = re.compile(
    r"(?:def|class|fn|func|function|struct|interface) \w+ ?[(:{<]|"
    r"(?:import|from|using|package) [\w.*{]+(?: import |;|$)|"
    r"(?:return|raise|assert|elif|yield|@|#|//|/\*|\*/|>>>|#include|if \(|for \(|while \(|let |var |const )|"
    r"[\w.\[\]\"'()]+ ?[-+*/|&:]?= ?\S|.*(?:[;{}(\[\])]|\):|[\"')\]],)$"
)
# UTF-8 that was read as Latin-1 or Windows-1252, and characters already lost
_C1 = "\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013\u2014\u2018-\u201e\u2020-\u2022\u2026\u2030\u2039\u203a\u20ac\u2122"  # noqa: E501
_MOJIBAKE = re.compile(rf"\ufffd|[\u00c2\u00c3\u00d0\u00d1\u00ce\u00cf][{_C1}]|[\u00e0-\u00ef][{_C1}]{{2}}")
_GENERATED = re.compile(
    r"(?:auto-?\s?|automatically |machine[- ])generated|generated automatically|do not edit|@generated|"
    r"do not modify (?:this|by hand)",
    re.I,
)
_GENERATED_BY = re.compile(r"generated (?:by|from|with)\b", re.I)  # ordinary words further down
_LICENCE = (
    "permission is hereby granted", "free of charge", "without limitation the rights", "subject to the following",
    "following conditions", "redistributions in", "redistributions of", "redistribution and", "'as is'", '"as is"',
    "merchantability", "fitness for a particular", "in no event shall", "liable for any", "copies or substantial",
    "without warranty", "licensed under the", "terms and conditions", "copyright notice", "copyright holder",
    "copyright owner", "derivative work", "grants to you", "grant to you", "perpetual, worldwide",
    "warranties or conditions", "list of conditions", "contributory", "licensor", "licensee", "sublicens",
)  # fmt: skip
_BOILERPLATE = (
    "accept all cookies", "accept cookies", "cookie policy", "cookie settings", "use cookies", "uses cookies",
    "privacy policy", "terms of service", "terms of use", "all rights reserved", "sign in", "sign up", "log in",
    "subscribe", "newsletter", "follow us", "share on", "share this", "skip to content", "skip to main", "back to top",
    "read more", "click here", "add to cart", "enable javascript", "toggle navigation", "next page", "previous page",
    "related posts", "related articles", "contact us", "about us", "sitemap", "powered by", "leave a reply",
    "leave a comment", "advertisement", "隐私政策", "版权所有", "登录", "注册", "上一页", "下一页",
)  # fmt: skip


def share(part: int, whole: int) -> float:
    """part / whole, and 0 of nothing."""
    return part / whole if whole else 0.0


def lettered_words(m: Measured) -> float:
    """Share of the words between blanks that hold a letter of any script; 1 of nothing (there is no bad word)."""
    return share(sum(_LETTER.search(word) is not None for word in m.tokens), len(m.tokens)) if m.tokens else 1.0


def symbols(m: Measured) -> float:
    """Share of visible characters that are neither letters, digits nor marks that belong to a letter."""
    found = "".join(_SYMBOLS.findall(m.text))
    if not found.isascii():
        found = "".join(c for c in found if unicodedata.category(c)[0] not in "MC")
    return share(len(_CONTROL.sub("", found)), m.visible)


def digits(m: Measured) -> float:
    """Share of visible characters that are digits."""
    return share(len("".join(_DIGITS.findall(m.text))), m.visible)


def long_words(m: Measured) -> float:
    """Share of visible characters that stand in words of 60 and more; Chinese and Japanese have no blanks and do not
    count."""
    long = [token for token in m.tokens if len(token) >= 60]
    parts = [part for token in long for part in _WIDE.split(token) if len(part) >= 60]
    return share(sum(map(len, parts)), m.visible)


def long_lines(m: Measured) -> float:
    """Share of the lines' characters that stand in lines of more than 500."""
    return share(sum(len(line) for line in m.lines if len(line) > 500), sum(map(len, m.lines)))


def repeated_lines(m: Measured) -> float:
    """Share of all characters that stand in lines which have occurred before."""
    seen: set[str] = set()
    repeats = 0
    for line in m.lines:
        repeats += len(line) if line in seen else 0
        seen.add(line)
    return share(repeats, len(m.text))


def repeated_ngrams(m: Measured, n: int = 10) -> float:
    """Share of the words that lie in a run of `n` words which has occurred before."""
    seen: set[tuple[str, ...]] = set()
    covered = end = 0  # words up to `end` are counted
    for start, gram in enumerate(zip(*(m.words[i:] for i in range(n)), strict=False)):
        if gram in seen:
            covered += start + n - max(end, start)
            end = start + n
        seen.add(gram)
    return share(covered, len(m.words))


def ellipses(m: Measured) -> float:
    """Share of the lines that end in an ellipsis, spelled as one character or as three dots."""
    return share(sum(line.endswith(("…", "...")) for line in m.lines), len(m.lines))


def per_hundred_words(phrases: tuple[str, ...]) -> Callable[[Measured], float]:
    """Occurrences of the phrases for each hundred words; a text of fewer than twenty words counts as twenty."""
    return lambda m: 100 * share(sum(map(m.lower.count, phrases)), max(20, len(m.words)))


@dataclass(frozen=True)
class Rule:
    """Rejects a text whose `measure` is below `low` or above `high`; `code` are the limits for code, None the same."""

    name: str
    why: str
    measure: Callable[[Measured], float]
    low: float = 0.0
    high: float = INFINITY
    code: tuple[float, float] | None = None

    def limits(self, is_code: bool) -> tuple[float, float]:
        """(low, high) of this kind of text."""
        return self.code if is_code and self.code is not None else (self.low, self.high)



def controls(m: Measured) -> float:
    """Share of characters that are control characters other than layout."""
    return share(len(_CONTROL.findall(m.text)), len(m.text))


def mojibake(m: Measured) -> float:
    """Wrongly decoded sequences per hundred characters."""
    return 0.0 if m.text.isascii() else 100 * share(len(_MOJIBAKE.findall(m.text)), len(m.text))


def generated(m: Measured) -> float:
    """Notices of a generator in the first thousand characters, or "generated by" in the first two hundred."""
    return len(_GENERATED.findall(m.text[:1000])) + len(_GENERATED_BY.findall(m.text[:200]))


RULES: tuple[Rule, ...] = (
    Rule("empty", "nothing to read: no visible character", lambda m: m.visible, low=1),
    Rule("too_short", "fewer words than a paragraph has", lambda m: len(m.words), low=20),
    Rule("too_long", "more characters than a book: a dump", lambda m: len(m.text), high=1_000_000),
    Rule("control_characters", "bytes that no text holds", controls, high=0),
    Rule("mojibake", "UTF-8 read under another encoding", mojibake, high=0.2),
    Rule("generated", "its head says that a program wrote it", generated, high=0),
    Rule("minified", "long lines: written for a machine", long_lines, code=(0, 0.3)),
    Rule("long_words", "words of 60 characters and more: encoded data", long_words, high=0.25, code=(0, 0.5)),
    Rule("numbers", "a table of data: too many digits", digits, high=0.2, code=(0, 0.3)),
    Rule("few_words_with_letters", "too few words hold a letter", lettered_words, low=0.7, code=(0.3, INFINITY)),
    Rule("symbols", "too many characters are neither letters nor digits", symbols, high=0.25, code=(0, 0.5)),
    Rule("licence", "a licence, by its phrases per hundred words", per_hundred_words(_LICENCE), high=2),
    Rule("boilerplate", "menus and notices, by phrases per hundred words", per_hundred_words(_BOILERPLATE), high=3),
    Rule("ellipses", "lines that break off: teasers, not a text", ellipses, high=0.3),
    Rule("repeated_lines", "the same lines again and again", repeated_lines, high=0.2, code=(0, 0.5)),
    Rule("repeated_ngrams", "the same ten words again and again", repeated_ngrams, high=0.25, code=(0, 0.65)),
)


def looks_like_code(text: str) -> bool:
    """True if one of eight lines begins or ends as a line of program does; the rest may be its comments."""
    lines = [line for line in map(str.strip, text[:20_000].split("\n")) if line][:400]
    signs = sum(_CODE_LINE.match(line[:100] + line[-3:]) is not None for line in lines)
    return bool(lines) and signs >= len(lines) / 8


def with_limits(limits: Mapping[str, float], rules: tuple[Rule, ...] = RULES) -> tuple[Rule, ...]:
    """The rules with other limits: {"min_too_short": 5, "max_symbols": 0.3}; a limit holds for prose and code.

    Raises ValueError for a name that is no rule's.
    """
    names = {rule.name for rule in rules}
    changed = {rule.name: rule for rule in rules}
    for key, value in limits.items():
        end, _, name = key.partition("_")
        if end not in ("min", "max") or name not in names:
            raise ValueError(f"limit {key!r}: expected min_ or max_ and one of {', '.join(sorted(names))}")
        rule = changed[name]
        low, high = (value, rule.high) if end == "min" else (rule.low, value)
        changed[name] = Rule(name, rule.why, rule.measure, low, high)
    return tuple(changed[rule.name] for rule in rules)


def apply_rules(text: str, rules: tuple[Rule, ...] = RULES) -> tuple[str, str] | None:
    """(name of the first rule that objects, the number and the limit in words), or None for a text that passes.

    >>> apply_rules("Too short.")
    ('too_short', '2, expected at least 20')
    """
    measured, is_code = Measured(text), looks_like_code(text)
    for rule in rules:
        low, high = rule.limits(is_code)
        value = rule.measure(measured)
        if value < low:
            return rule.name, f"{value:.3g}, expected at least {low:g}"
        if value > high:
            return rule.name, f"{value:.3g}, expected at most {high:g}"
    return None
