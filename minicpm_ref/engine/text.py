"""From token ids to the text that may be shown: whole characters, no stop strings, thoughts apart from answers.

Problem. A token is not a character. Bytes of one character come in several tokens, a stop string begins in one token
and ends in another, and so does `</think>`. Who decodes token by token shows U+FFFD, half a stop string, or a tag.

Idea. Three filters one after the other, each of which holds back the shortest tail about which the future can still
decide, and lets go of it when nothing more comes:

- `TextStream`: ids to text. The pieces always add up to what `Tokenizer.decode` makes of all ids. What waits is a
  character whose bytes are not all there.
- `Thoughts`: text to (thought, answer). What waits is the beginning of a tag.
- `StopStrings`: text up to the first match. What waits is a tail that is the beginning of a stop string.

Left out: nothing is repaired. Ids that spell invalid UTF-8 give U+FFFD, as `decode` does.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from minicpm_ref.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"


class TextStream:
    """Text as ids arrive, in the sense of `Tokenizer.decode(ids, continues=True)`.

    >>> stream = TextStream(tokenizer)
    >>> "".join(stream.push(token) for token in ids) + stream.flush() == tokenizer.decode(ids, continues=True)
    True
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that `token` completes, sometimes empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What was held back; nothing more comes."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Lets text through up to the first of `stops`, which is never shown itself. `hit` tells that it came.

    Raises ValueError for an empty stop string: it is part of every text.

    >>> filter = StopStrings(["own fox"])
    >>> [filter.push(piece) for piece in ("The br", "own", " fox jumps")], filter.hit
    (['The br', '', ''], True)
    """

    def __init__(self, stops: Sequence[str]):
        if "" in stops:
            raise ValueError(f"stop = {list(stops)!r}: an empty stop string is part of every text")
        self._stops, self._held, self.hit = tuple(stops), "", False

    def push(self, text: str) -> str:
        """What of `text`, and of what was held back, may be shown now."""
        if self.hit:
            return ""
        text = self._held + text
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:  # the one that is complete first, as if the text had come character by character
            self.hit, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back for a match that did not come."""
        held, self._held = self._held, ""
        return held


class Thoughts:
    """Splits a text that may open with `<think>...</think>` into pieces (is it a thought, text).

    Tags, and the blank lines around them, belong to neither. A text that does not open with the tag is an answer from
    its first character on, and a tag that comes later is ordinary text.

    >>> thoughts = Thoughts()
    >>> thoughts.push("<think>\\na</th") + thoughts.push("ink>\\n\\nb") + thoughts.flush()
    [(True, 'a'), (False, 'b')]
    """

    def __init__(self) -> None:
        self._state, self._held = "start", ""

    def push(self, text: str) -> list[tuple[bool, str]]:
        """The pieces that `text` decides."""
        self._held += text
        pieces: list[tuple[bool, str]] = []
        if self._state == "start":
            opening = self._held.lstrip()
            if opening.startswith(OPEN):
                self._state, self._held = "thought starts", opening[len(OPEN) :]
            elif not OPEN.startswith(opening):  # "" is the beginning of a tag, too
                self._state = "answer"
        if self._state == "thought starts":
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = "thought"
        if self._state == "thought":
            place = self._held.find(CLOSE)
            if place >= 0:
                pieces.append((True, self._held[:place].rstrip("\n")))
                self._state, self._held = "answer starts", self._held[place + len(CLOSE) :]
            else:
                keep = _overlap(self._held, CLOSE)
                body = self._held[: len(self._held) - keep].rstrip("\n")  # line breaks wait: the tag may follow them
                pieces.append((True, body))
                self._held = self._held[len(body) :]
        if self._state == "answer starts":
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = "answer"
        if self._state == "answer":
            pieces.append((False, self._held))
            self._held = ""
        return [piece for piece in pieces if piece[1]]

    def flush(self, cut: bool = False) -> list[tuple[bool, str]]:
        """What was held back; nothing more comes. `cut`: the text was broken off, so that the beginning of a tag is one
        that was not finished, and is not shown."""
        held, self._held = self._held, ""
        if cut and held.strip() and (OPEN.startswith(held.strip()) or CLOSE.startswith(held.strip())):
            return []
        return [(self._state == "thought", held)] if held.strip() or (held and self._state == "start") else []


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, and shorter than it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
