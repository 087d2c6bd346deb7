"""Planted junk: eight kinds of bad documents with known truth, to measure a filter by.

The problem: precision and recall need documents of which it is known what they are, and real junk has no label.
The idea: each kind is written by a small seeded generator that imitates a real thing, and varies what a rule could
latch on to (length, words, layout). `KINDS` names for each kind the rules that may be the reason; a document that goes
for another reason counts as found, but not as understood.

Besides the eight kinds: `near_copy` changes a share of a text's words, and `word_salad` shuffles real words, which no
rule can tell from text; that is the classifier's work.
"""

from __future__ import annotations

import base64
import random
import re
from collections.abc import Callable

WORDS = [
    *("system", "value", "result", "number", "order", "point", "state", "group", "market", "public", "little", "world"),
    *("house", "small", "water", "large", "family", "program", "question", "during", "company", "service", "because"),
    *("another", "between", "several", "however", "research", "information", "development", "children", "history"),
    *("government", "interest", "problem", "example", "different", "important", "possible", "general", "local"),
]
NAMES = ["alpha", "beta", "gamma", "delta", "node", "path", "item", "key", "value", "left", "index", "count", "parse"]
FURNITURE = [
    *("Skip to main content", "Sign in", "Sign up", "Subscribe to our newsletter", "Accept all cookies", "Sitemap"),
    *("Cookie settings", "Privacy policy", "Terms of service", "Contact us", "About us", "Follow us on social media"),
    *("Share this article", "Read more", "Related posts", "Add to cart", "Back to top", "Leave a comment", "Next page"),
]


def _sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)).capitalize() + "."


def minified(rng: random.Random) -> str:
    """A script without spaces or line breaks."""
    name = lambda: rng.choice("abcdefghijkmnopqrstuvwxyz") + rng.choice(["", *"abcdexyz"])  # noqa: E731
    parts = [
        f"function {name()}({name()},{name()}){{var {name()}={name()}.{rng.choice(NAMES)}({rng.randrange(99)});"
        f"return {name()}?{name()}({name()},!0):{name()}&&{name()}.{rng.choice(NAMES)}}}"
        for _ in range(rng.randrange(25, 60))
    ]
    return "!" + ";".join(parts) + ";"


def number_table(rng: random.Random) -> str:
    """Rows of measurements or of a code page, with few words in between."""
    if rng.random() < 0.5:
        rows = (", ".join(f"{rng.uniform(-9, 9):.{rng.randrange(3, 7)}f}" for _ in range(6)) for _ in range(60))
        return "x, y, z, u, v, w\n" + "\n".join(rows)
    rows = (f"    0x{rng.randrange(65536):04x}: 0x{rng.randrange(65536):04x},  # {i}" for i in range(120))
    return "TABLE = {\n" + "\n".join(rows) + "\n}\n"


def licence(rng: random.Random) -> str:
    """A licence and nothing else: clauses of well-known ones, in the names of somebody."""
    clauses = [
        "Permission is hereby granted, free of charge, to any person obtaining a copy of this software, to deal in the "
        "software without restriction, including without limitation the rights to use, copy, modify, merge, publish, "
        "distribute, sublicense, and/or sell copies, subject to the following conditions:",
        "The above copyright notice and this permission notice shall stand in all copies or substantial portions.",
        "Redistributions in binary form must reproduce the above copyright notice, this list of conditions and the "
        "following disclaimer in the documentation and/or other materials provided with the distribution.",
        "The software is provided 'as is', without warranty of any kind, express or implied, including warranties of "
        "merchantability, fitness for a particular purpose and noninfringement.",
        "In no event shall the authors or copyright holders be liable for any claim, damages or other liability.",
        "Each contributor grants to you a perpetual, worldwide licence to prepare derivative works of the "
        "licensor's work, and licensee accepts the terms and conditions of this agreement.",
    ]
    chosen = rng.sample(clauses, rng.randrange(3, len(clauses) + 1))
    owner = f"{rng.choice(WORDS).title()} {rng.choice(WORDS).title()}"
    return "\n\n".join([f"Copyright (c) {rng.randrange(1990, 2025)} {owner}", *chosen]) + "\n"


def mojibake(rng: random.Random) -> str:
    """Sentences with accents or Chinese, in UTF-8 that was read as Windows-1252."""
    foreign = ["café", "naïve", "größe", "señor", "“quoted”", "l’été", "über", "façade", "中文的信息", "世界"]
    words = [rng.choice(WORDS) if rng.random() < 0.8 else rng.choice(foreign) for _ in range(rng.randrange(60, 200))]
    raw = " ".join(words + ["naïve", "café", "größe"]).encode()
    return "".join(bytes([b]).decode("cp1252", "ignore") or chr(b) for b in raw)


def boilerplate(rng: random.Random) -> str:
    """What stands around an article: menus, notices, links to other articles."""
    lines = [rng.choice(FURNITURE) if rng.random() < 0.7 else _sentence(rng, 4) for _ in range(rng.randrange(25, 70))]
    return "\n".join(lines)


def repeated(rng: random.Random) -> str:
    """A log or a spam page: a few lines, over and over."""
    lines = [_sentence(rng, rng.randrange(5, 14)) for _ in range(rng.randrange(2, 6))]
    return "\n".join(rng.choice(lines) for _ in range(rng.randrange(20, 80)))


def encoded(rng: random.Random) -> str:
    """A file in base 64 with a short head, as mail and test fixtures hold it."""
    raw = rng.randbytes(rng.randrange(800, 4000))
    head = "\n".join(f"{rng.choice(WORDS).title()}: {_sentence(rng, 4)}" for _ in range(5))
    return head + "\n\n" + base64.encodebytes(raw).decode()


def generated(rng: random.Random) -> str:
    """Source that a program wrote and says so."""
    tool = rng.choice(["the protocol compiler", "swig", "lemon", "make_tables.py", "the build system"])
    head = rng.choice(
        [f"# Generated by {tool}. DO NOT EDIT!", f"# This file was automatically generated by {tool}.",
         f"# -*- autogenerated by {tool}, do not edit -*-"]
    )  # fmt: skip
    body = "\n".join(
        f"class {rng.choice(WORDS).title()}{rng.choice(WORDS).title()}(Message):\n"
        f"    {rng.choice(NAMES)} = Field({rng.randrange(40)}, '{rng.choice(WORDS)}')\n"
        f"    {rng.choice(NAMES)} = Field({rng.randrange(40)}, '{rng.choice(WORDS)}')\n"
        for _ in range(rng.randrange(10, 40))
    )
    return f"{head}\n\n{body}"


KINDS: dict[str, tuple[Callable[[random.Random], str], tuple[str, ...]]] = {
    "minified": (minified, ("minified", "long_words")),
    "number_table": (number_table, ("numbers", "few_words_with_letters")),
    "licence": (licence, ("licence",)),
    "mojibake": (mojibake, ("mojibake",)),
    "boilerplate": (boilerplate, ("boilerplate",)),
    "repeated": (repeated, ("repeated_lines", "repeated_ngrams")),
    "encoded": (encoded, ("long_words",)),
    "generated": (generated, ("generated",)),
}


def plant(kind: str, seed: int) -> str:
    """The junk document number `seed` of a kind. Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    return KINDS[kind][0](random.Random(f"{kind} {seed}"))


def near_copy(text: str, share: float, seed: int) -> str:
    """`text` with this share of its words (between blanks) replaced; layout unchanged."""
    rng = random.Random(f"copy {seed}")
    parts = [
        rng.choice(WORDS) if part and not part.isspace() and rng.random() < share else part
        for part in _split_blanks(text)
    ]
    return "".join(parts)


def word_salad(text: str, seed: int) -> str:
    """The words of `text` in random order, with its layout: every count of a rule stays as it was."""
    rng = random.Random(f"salad {seed}")
    parts = _split_blanks(text)
    places = [i for i, part in enumerate(parts) if part and not part.isspace()]
    words = [parts[i] for i in places]
    rng.shuffle(words)
    for place, word in zip(places, words, strict=True):
        parts[place] = word
    return "".join(parts)


def _split_blanks(text: str) -> list[str]:
    """Words and the blanks between them; joined they are the text."""
    return re.split(r"(\s+)", text)
