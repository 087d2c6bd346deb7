"""Ids to text that may be shown: whatever the cut, the pieces add up, and nothing is shown too early."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from minicpm_ref.checkpoint import EMBEDDED
from minicpm_ref.engine.text import StopStrings, TextStream, Thoughts
from minicpm_ref.tokenizer import BOS, EOS, Tokenizer

FALLBACK = Tokenizer.load(EMBEDDED / "base" / "tokenizer.json")


def byte_level() -> Tokenizer:
    """A vocabulary of the other kind: every token is some bytes of UTF-8."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({BOS: 0, EOS: 1} | {sign: 2 + i for i, sign in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS, EOS])
    return Tokenizer(backend)


def metaspace() -> Tokenizer:
    """A vocabulary whose decoder drops the blank at the start of a text, as the published MiniCPM4 one does."""
    words = [BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "▁b", "c", "▁"]
    backend = Backend(models.BPE({word: i for i, word in enumerate(words)}, []))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens([BOS, EOS])
    return Tokenizer(backend)


TOKENIZERS = {"fallback": FALLBACK, "byte-level": byte_level(), "metaspace": metaspace()}


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_add_up_for_any_ids(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    near = st.integers(0, min(tokenizer.vocab_size, 300) - 1)  # bytes and special tokens, mostly
    ids = data.draw(st.lists(st.one_of(near, st.integers(0, tokenizer.vocab_size - 1)), max_size=24))
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, continues=True)


@pytest.mark.parametrize("name", ["fallback", "byte-level"])
def test_characters_are_never_split(name: str) -> None:
    """Trap 1.1: one byte a token."""
    tokenizer = TOKENIZERS[name]
    text = "a\U0001f63ab\u8d4b\u8d4bc"
    if name == "fallback":
        ids = [tokenizer._required_id(f"<0x{byte:02X}>") for byte in text.encode()]
    else:
        ids = tokenizer.encode(text, add_bos=False)
    assert len(ids) == len(text.encode())
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    planted = [tokenizer.decode([token]) for token in ids]  # each token on its own
    assert "".join(planted) != text


def test_byte_level_text_comes_as_soon_as_a_character_is_complete() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    pieces = pieces_of(tokenizer, tokenizer.encode("é!", add_bos=False))
    assert pieces == ["", "é", "!", ""]


TEXT = "The quick brown fox jumps"


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(places), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


@settings(max_examples=120, deadline=None)
@given(
    places=st.lists(st.integers(0, len(TEXT)), max_size=8),
    span=st.tuples(st.integers(0, len(TEXT) - 1), st.integers(1, 9)),
    other=st.sampled_from(["xyz", "fox jumps!", "quick b?", "k"]),
)
def test_a_stop_string_is_found_however_it_is_cut(places: list[int], span: tuple[int, int], other: str) -> None:
    stop = TEXT[span[0] : sum(span)]
    for stops in ([stop], [stop, other], [other]):
        found = [(TEXT.find(s) + len(s), TEXT.find(s)) for s in stops if s in TEXT]
        expected = TEXT[: min(found)[1]] if found else TEXT  # the first to be complete
        scanner = StopStrings(stops)
        shown = "".join(scanner.push(piece) for piece in cut(TEXT, places)) + scanner.flush()
        assert shown == expected
        assert scanner.hit == bool(found)


def test_only_what_could_still_match_is_held_back() -> None:
    scanner = StopStrings(["own fox", "ww"])
    assert [scanner.push(piece) for piece in ("The br", "ow", "n f", "u", "ow")] == ["The br", "", "", "own fu", ""]
    assert scanner.flush() == "ow"
    planted = [piece for piece in ("The br", "own f", "ox") if "own fox" not in piece]  # looks at pieces alone
    assert "".join(planted) == "The brown fox"
    with pytest.raises(ValueError, match="empty stop"):
        StopStrings(["a", ""])


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>a</think>b", "a", "b"),
        ("<think>\na\n\nc\n</think>\n\nb\n", "a\n\nc", "b\n"),
        ("\n<think></think>b", "", "b"),
        ("<think>a</thin", "a</thin", ""),
        ("<thin", "", "<thin"),
        ("b <think>a</think>", "", "b <think>a</think>"),
        ("b", "", "b"),
        ("  ", "", "  "),
        ("", "", ""),
        ("<think>a</think>b</think>", "a", "b</think>"),
    ],
)
def test_thoughts_are_split_wherever_the_text_is_cut(text: str, thought: str, answer: str) -> None:
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            thoughts = Thoughts()
            pieces = [piece for part in cut(text, [first, second]) for piece in thoughts.push(part)] + thoughts.flush()
            assert "".join(part for kind, part in pieces if kind) == thought
            assert "".join(part for kind, part in pieces if not kind) == answer
