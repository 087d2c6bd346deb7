"""ScalingBench: questions whose answer a program can check, made from files that no model was trained on.

The problem: loss on text does not say what a model can *do*, and at the scale of a wind tunnel it can do next to
nothing. What still moves is the loss of the right answer given the question. So every question here has a reference
solution, whose conditional loss is measured in bits per *byte* (a model with another tokenizer can join), and a score:
whether the model finds the solution more likely than three wrong ones. Guessing scores 1/4, which is the curve's floor.

Five kinds, all read off real Python by the `tokenize` module, so the truth is the file's:
a closing bracket, a name that stands further up, the argument of an import, the indentation after a colon, and a sum
of two numbers that occur in the file.

Prompts end where a token naturally ends (before the space of a word, before a line break), because prompt and option
are encoded separately. No option begins with another, else the shorter one would win by being shorter.

Left out: free generation. Tiny models score 0 there, and a curve needs points off its floor.

Sources: MiniCPM4 technical report (arXiv 2506.07900) section 2.3 (loss of reference solutions); Gao et al.,
lm-evaluation-harness (choice by likelihood).
"""

from __future__ import annotations

import hashlib
import io
import keyword
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

from minicpm_ref.data import Document

KINDS = ("close_bracket", "recall_name", "import_argument", "indentation", "arithmetic")
CONTEXT = 400  # characters of the file that a prompt shows
OPTIONS = 4
GUESSING = 1 / OPTIONS
CLOSERS = {")": "(", "]": "[", "}": "{"}


@dataclass(frozen=True)
class Question:
    """A prompt, options of which `options[answer]` is the reference solution, and the file it came from."""

    kind: str
    prompt: str
    options: tuple[str, ...]
    answer: int
    source: str

    def __post_init__(self) -> None:
        for one, other in permutations(self.options, 2):
            if one.startswith(other):
                raise ValueError(f"{self.source}: option {one!r} begins with option {other!r}")

    @property
    def solution(self) -> str:
        """The right option."""
        return self.options[self.answer]


@dataclass(frozen=True)
class Piece:
    """A token of a file: its type, its text, and the character offset at which it begins."""

    kind: int
    text: str
    start: int


def make_questions(documents: Sequence[Document], per_kind: int = 40) -> list[Question]:
    """`per_kind` questions of each kind (fewer where the files hold fewer), the same ones for the same documents.

    >>> from minicpm_ref import checkpoint, data
    >>> held_out = data.read_held_out(checkpoint.EMBEDDED / "held_out.jsonl")
    >>> make_questions(held_out, 1)[0].kind
    'close_bracket'
    """
    found: dict[str, dict[str, Question]] = {kind: {} for kind in KINDS}
    imports = sorted({name for document in documents for _, name in _imports(document.text)})
    for document in documents:
        pieces = read_pieces(document.text)
        for question in (
            *_close_bracket(document, pieces),
            *_recall_name(document, pieces),
            *_import_argument(document, imports),
            *_indentation(document, pieces),
            *_arithmetic(document, pieces),
        ):
            found[question.kind].setdefault(question.prompt, question)
    # the order of a hash is as good as random and the same on every machine
    return [
        question
        for kind in KINDS
        for question in sorted(found[kind].values(), key=lambda q: _digest(q.source, q.prompt, q.solution))[:per_kind]
    ]


def read_pieces(text: str) -> list[Piece]:
    """The tokens of a Python file; those before the error when it cannot be read to its end.

    An f-string is left out whole: Python 3.12 reads the code inside it and 3.11 does not.
    """
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    pieces: list[Piece] = []
    inside = 0
    opening, closing = (getattr(tokenize, f"FSTRING_{end}", -1) for end in ("START", "END"))
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            inside += token.type == opening
            if not inside:
                pieces.append(Piece(token.type, token.string, starts[token.start[0] - 1] + token.start[1]))
            inside -= token.type == closing
    except (tokenize.TokenError, SyntaxError):  # a file of another Python; what was read so far is good
        return pieces
    return pieces


def _prompt(text: str, end: int, shortest: int = 100) -> str | None:
    """Whole lines of `text` before `end`, about CONTEXT characters; None when there is too little."""
    start = max(0, end - CONTEXT)
    if start:
        start = text.find("\n", start) + 1
    return text[start:end] if end - start >= shortest else None


def _digest(*parts: object) -> bytes:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).digest()


def _question(
    kind: str, document: Document, prompt: str | None, right: str, wrong: Sequence[str]
) -> Iterator[Question]:
    """The question, its options in the order of a hash; nothing when it would be ambiguous."""
    options = [right, *wrong]
    if prompt is None or len(set(options)) != OPTIONS or any(a.startswith(b) for a, b in permutations(options, 2)):
        return
    options.sort(key=lambda option: _digest("order", document.path, prompt, option))
    yield Question(kind, prompt, tuple(options), options.index(right), document.path)


def _close_bracket(document: Document, pieces: Sequence[Piece]) -> Iterator[Question]:
    """Which bracket closes here? Its partner stands in the prompt."""
    open_brackets: list[Piece] = []
    for piece in pieces:
        if piece.kind != tokenize.OP:
            continue
        if piece.text in CLOSERS.values():
            open_brackets.append(piece)
        elif piece.text in CLOSERS and open_brackets:
            partner = open_brackets.pop()
            prompt = _prompt(document.text, piece.start)
            shown = prompt is not None and partner.start >= piece.start - len(prompt)
            if shown and CLOSERS[piece.text] == partner.text:
                others = [sign for sign in (*CLOSERS, ",") if sign != piece.text]
                yield from _question("close_bracket", document, prompt, piece.text, others)


def _recall_name(document: Document, pieces: Sequence[Piece]) -> Iterator[Question]:
    """Which of four names from the lines above comes next?"""
    names = [p for p in pieces if p.kind == tokenize.NAME and len(p.text) > 2 and not keyword.iskeyword(p.text)]
    for i, piece in enumerate(names):
        if document.text[piece.start - 1 : piece.start] != " ":
            continue
        prompt = _prompt(document.text, piece.start - 1)
        if prompt is None:
            continue
        first = piece.start - 1 - len(prompt)
        above = list(dict.fromkeys(p.text for p in names[:i] if p.start >= first))
        others = [f" {name}" for name in above if name != piece.text]
        if piece.text in above and len(others) >= OPTIONS - 1:
            others.sort(key=lambda other: _digest(document.path, piece.start, other))
            yield from _question("recall_name", document, prompt, f" {piece.text}", others[: OPTIONS - 1])


def _imports(text: str) -> list[tuple[int, str]]:
    """(offset behind the word import, what is imported) of every import line."""
    pattern = re.compile(r"^[ \t]*(?:from[ ]\S+[ ]import|import)(?=[ ](\w+))", re.M)
    return [(match.end(), match[1]) for match in pattern.finditer(text)]


def _import_argument(document: Document, everywhere: Sequence[str]) -> Iterator[Question]:
    """What is imported here? The wrong options are imported in other files."""
    own = _imports(document.text)
    foreign = [name for name in everywhere if name not in {name for _, name in own}]
    for end, name in own:
        others = sorted(foreign, key=lambda other: _digest(document.path, end, other))
        wrong = [f" {other}" for other in others[: OPTIONS - 1]]
        yield from _question("import_argument", document, _prompt(document.text, end, 40), f" {name}", wrong)


def _indentation(document: Document, pieces: Sequence[Piece]) -> Iterator[Question]:
    """How far is the line after a colon indented?"""
    for colon, newline, indent, word in zip(pieces, pieces[1:], pieces[2:], pieces[3:], strict=False):
        if (colon.text, newline.kind, indent.kind, word.kind) != (
            ":",
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.NAME,
        ):
            continue
        depth = len(indent.text) - 4
        if indent.text.strip(" ") or depth < 0:
            continue
        wrong = (depth, depth + 8, depth - 4 if depth else depth + 12)
        right, *others = (f"\n{' ' * spaces}{word.text}" for spaces in (depth + 4, *wrong))
        yield from _question("indentation", document, _prompt(document.text, colon.start + 1), right, others)


def _arithmetic(document: Document, pieces: Sequence[Piece]) -> Iterator[Question]:
    """What is the sum of two numbers of this file? Two solved sums stand in front."""
    numbers = [int(p.text) for p in pieces if p.kind == tokenize.NUMBER and re.fullmatch(r"[1-9]\d?", p.text)]
    for a, b, c, d, e, f in zip(*(numbers[i::6] for i in range(6)), strict=False):
        prompt = f">>> {a} + {b}\n{a + b}\n>>> {c} + {d}\n{c + d}\n>>> {e} + {f}\n"
        if len({(a, b), (c, d), (e, f)}) < 3:
            continue  # a sum that has just been solved is copied, not calculated
        total = e + f
        wrong = [f"{other}\n" for other in (total + 1, total + 10, abs(total - 2))]
        yield from _question("arithmetic", document, prompt, f"{total}\n", wrong)
