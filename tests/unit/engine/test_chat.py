"""The terminal chat: turns, commands, Ctrl-C at any moment, and text that cannot take over the terminal."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from scripted import TOKENIZER, encode, scripted_engine

from minicpm_ref.engine.chat import Chat, run_chat, visible

EOS = TOKENIZER.eos_ids[0]
SCRIPT = encode("The quick brown fox jumps over it")
G = TOKENIZER.decode(SCRIPT)


class Terminal:
    """Types the given lines and notes what is shown; an exception among them is what the keyboard raises."""

    def __init__(self, *lines: str | type[BaseException]):
        self.lines: Iterator[str | type[BaseException]] = iter([*lines, EOFError])
        self.shown: list[str] = []

    def __call__(self, text: str, dim: bool = False) -> None:
        self.shown.append(text)

    def read(self, prompt: str) -> str:
        line = next(self.lines)
        if isinstance(line, str):
            return line
        raise line


def talk(chat: Chat, *lines: str | type[BaseException]) -> str:
    terminal = Terminal(*lines)
    run_chat(chat, terminal, terminal.read)
    return "".join(terminal.shown)


def test_turns_add_up_and_commands_work() -> None:
    chat = Chat(scripted_engine([*SCRIPT, EOS]), system="be kind")
    shown = talk(chat, "hello", "", "  ", KeyboardInterrupt, "again", "/no_think", "/help", "/nothing")
    assert shown.count(G) == 3  # "/nothing" is no command, so it is a question
    assert [message["role"] for message in chat.messages] == ["system", *["user", "assistant"] * 3]
    assert chat.messages[2]["content"] == G
    assert chat.thinking is False
    assert "from the cache" in shown
    talk(chat, "/reset", "/think", "/exit", "never asked")
    assert chat.messages == [{"role": "system", "content": "be kind"}]
    assert chat.thinking is True


def test_later_turns_reuse_the_cache() -> None:
    chat = Chat(scripted_engine([*SCRIPT, EOS]))
    list(chat.ask("hello"))
    read = chat.stream.result.statistics.prompt_tokens
    list(chat.ask("and now?"))
    assert chat.stream.result.statistics.reused_tokens >= read


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_ctrl_c_stops_the_answer_only(tokens: int) -> None:
    """Trap 7.1: what was shown stays in the history, the next question works."""
    engine = scripted_engine([*SCRIPT, EOS])
    calls = 0

    def strike() -> None:
        nonlocal calls
        if calls == tokens:
            os.kill(os.getpid(), signal.SIGINT)
        calls += 1

    engine.executor.before_call = strike
    before = signal.getsignal(signal.SIGINT)
    chat = Chat(engine)
    shown = talk(chat, "first", "second")
    assert signal.getsignal(signal.SIGINT) is before
    first, second = chat.messages[1]["content"], chat.messages[3]["content"]
    assert first == TOKENIZER.decode(SCRIPT[: tokens + 1])  # the step that was under way is finished
    assert second == G
    assert "ended by cancelled" in shown


def test_a_full_conversation_says_so() -> None:
    chat = Chat(scripted_engine([*SCRIPT, EOS], max_length=40))
    shown = talk(chat, "hello there", "x " * 60, "/reset", "hi")
    assert "/reset begins a new conversation" in shown
    assert len(chat.messages) == 2  # the question that did not fit is not in the history


def test_thoughts_are_shown_and_not_remembered() -> None:
    chat = Chat(scripted_engine([*encode("<think>hm</think>yes"), EOS]))
    pieces = list(chat.ask("well?"))
    assert "".join(piece.text for piece in pieces if piece.thought) == "hm"
    assert chat.messages[-1]["content"] == "yes"
    with pytest.raises(ValueError, match="blank"):
        list(chat.ask(" \n"))


def test_controls_are_pictures() -> None:
    assert visible("a\x1b[24D\x1b[K\n\tb\x7f\x9b") == "a\u241b[24D\u241b[K\n\tb\u2421\ufffd"
    escapes = [TOKENIZER._required_id(f"<0x{byte:02X}>") for byte in b"\x1b[2J"]
    assert "\x1b" not in talk(Chat(scripted_engine([*escapes, EOS])), "hello")
