"""A conversation in the terminal: several turns, streamed, on one engine.

Ctrl-C during an answer stops the answer and nothing else: the request is cancelled between two steps, what was shown
stays in the history, and the next question reuses what the cache holds. At the prompt it clears the line; Ctrl-D
leaves.

What a model writes is shown, not obeyed: control characters other than line break and tab, with which a text could
move the cursor or rename the window, appear as pictures of themselves (U+241B for escape).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from minicpm_ref.engine.engine import ContextLengthError, Engine, Stream
from minicpm_ref.engine.request import Piece
from minicpm_ref.sampling import SamplingParams

HELP = """/reset     forget the conversation
/think     let the model reason before it answers
/no_think  answer at once
/exit      leave (or Ctrl-D)
Ctrl-C stops an answer."""


@dataclass
class Chat:
    """The state of a conversation. `system` is an instruction in front of it, `thinking` None leaves it to the model.

    >>> chat = Chat(Engine())
    >>> text = "".join(piece.text for piece in chat.ask("Hello!"))
    """

    engine: Engine
    params: SamplingParams = SamplingParams()
    max_new_tokens: int | None = None
    system: str | None = None
    thinking: bool | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    stream: Stream | None = None

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, but for the system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, text: str) -> Iterator[Piece]:
        """The answer to `text`, piece by piece; `stop` ends it early. Question and answer, as far as it came, stay in
        the conversation. Raises ValueError for a blank question, ContextLengthError when the conversation is too long.
        """
        if not text.strip():
            raise ValueError("the question is blank: expected some text")
        asked = [*self.messages, {"role": "user", "content": text}]
        request = self.engine.request(
            asked, self.max_new_tokens, self.params, enable_thinking=self.thinking, split_thoughts=True
        )
        self.stream = stream = self.engine.submit(request)
        try:
            while True:
                try:
                    yield stream.next_piece()
                except StopIteration:
                    return
        finally:
            stream.close()
            self.messages = [*asked, {"role": "assistant", "content": stream.result.text}]

    def stop(self) -> None:
        """End the present answer before the next token."""
        if self.stream is not None:
            self.stream.close()


class Screen(Protocol):
    """Where text goes: `write(text, dim)` at once, without a line break of its own."""

    def __call__(self, text: str, dim: bool = False) -> None: ...


def visible(text: str) -> str:
    """`text` with its control characters, but for line break and tab, as pictures.

    >>> visible("a\\x1b[2J")
    'a\u241b[2J'
    """
    pictures = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
    pictures |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
    return text.translate(pictures)


def run_chat(chat: Chat, screen: Screen, read_line: Callable[[str], str] = input) -> None:
    """Talk until the input ends. Commands start with a slash; see `HELP`."""
    screen(HELP + "\n", dim=True)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # half a character from a terminal must not end the conversation
    while True:
        try:
            line = read_line("\n> ")
        except KeyboardInterrupt:
            screen("\n")
            continue
        except EOFError:
            screen("\n")
            return
        command = line.strip()
        if command == "/exit":
            return
        if command == "/reset":
            chat.reset()
            screen("a new conversation\n", dim=True)
        elif command in ("/think", "/no_think"):
            chat.thinking = command == "/think"
            screen(f"thinking is {'on' if chat.thinking else 'off'}\n", dim=True)
        elif command == "/help":
            screen(HELP + "\n", dim=True)
        elif command:
            _answer(chat, screen, line)


def _answer(chat: Chat, screen: Screen, question: str) -> None:
    """Show one answer and what it cost; Ctrl-C stops it."""

    def interrupted(number: int, frame: FrameType | None) -> None:
        chat.stop()

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        for piece in chat.ask(question):
            screen(visible(piece.text), dim=piece.thought)
    except ContextLengthError as error:
        screen(f"{error}; /reset begins a new conversation\n", dim=True)
        return
    finally:
        signal.signal(signal.SIGINT, before)
    assert chat.stream is not None  # `ask` has set it
    result = chat.stream.result
    counts = result.statistics
    note = "" if result.finish_reason == "stop" else f", ended by {result.finish_reason}"
    screen(
        f"\n[{counts.prompt_tokens} tokens read, {counts.reused_tokens} of them from the cache; "
        f"{counts.completion_tokens} written{note}]\n",
        dim=True,
    )
