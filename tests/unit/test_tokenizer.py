"""Byte-pair encoding with byte fallback: round trips, special tokens, ChatML."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_ref.tokenizer import BOS, END_OF_TURN, EOS, TURN, Tokenizer

TEXT = "def add(first, second):\n    return first + second\n\n\nclass Adder:\n    pass\n" * 40


@functools.cache
def tokenizer() -> Tokenizer:
    words = " ".join(f"word{i} value_{i % 7} self.name{i}" for i in range(300))
    return Tokenizer.train([TEXT, words], vocab_size=400, alphabet=60)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_every_text_round_trips(text: str) -> None:
    assert tokenizer().decode(tokenizer().encode(text)) == text


@pytest.mark.parametrize(
    "text", ["你好,世界", "🙂🏳️‍🌈", "naïve \u0000 \ufeff", "a\r\n\tb  c   ", "<s></s><unk><0x41><|im_end|>", ""]
)
def test_awkward_texts_round_trip(text: str) -> None:
    assert tokenizer().decode(tokenizer().encode(text, add_bos=False)) == text


def test_unknown_characters_fall_back_to_their_bytes() -> None:
    t = tokenizer()
    assert [t.token(i) for i in t.encode("你", add_bos=False)] == ["<0xE4>", "<0xBD>", "<0xA0>"]


def test_special_tokens_spelled_out_in_a_text_stay_text() -> None:
    t = tokenizer()
    special = {t.bos_id, *t.eos_ids, t._required_id(TURN)}
    assert not special & set(t.encode(f"{BOS}{EOS}{TURN}system\n{END_OF_TURN}", add_bos=False))


def test_line_breaks_carry_their_indentation() -> None:
    t = tokenizer()
    assert "\n    " in [t.token(i) for i in t.encode("pass:\n    return", add_bos=False)]


def test_vocabulary_has_exactly_the_size_asked_for_and_training_repeats() -> None:
    t = tokenizer()
    assert t.vocab_size == 400
    assert [t.token(i) for i in range(3)] == ["<unk>", BOS, EOS]
    again = Tokenizer.train([TEXT], vocab_size=300, alphabet=30)
    same = Tokenizer.train([TEXT], vocab_size=300, alphabet=30)
    assert again._backend.to_str() == same._backend.to_str()


def test_a_saved_tokenizer_loads_to_the_same_ids(tmp_path) -> None:
    tokenizer().save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.encode(TEXT + "你好") == tokenizer().encode(TEXT + "你好")
    assert (loaded.bos_id, loaded.eos_ids) == (tokenizer().bos_id, tokenizer().eos_ids)


def test_chat_template_is_chatml() -> None:
    t = tokenizer()
    turn, end = t._required_id(TURN), t._required_id(END_OF_TURN)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"hi {END_OF_TURN}"}]
    ids = t.apply_chat_template(messages)
    parts = [t.bos_id, turn, *t.encode("system\nBe brief.", False), end, *t.encode("\n", False)]
    parts += [turn, *t.encode(f"user\nhi {END_OF_TURN}", False), end, *t.encode("\n", False)]
    assert ids == [*parts, turn, *t.encode("assistant\n", False)]
    assert ids.count(end) == 2  # the one the user typed is text
    assert t.apply_chat_template(messages, add_generation_prompt=False) == parts


def test_thinking_can_be_switched_off() -> None:
    t = tokenizer()
    messages = [{"role": "user", "content": "hi"}]
    default, off = t.apply_chat_template(messages), t.apply_chat_template(messages, enable_thinking=False)
    assert t.apply_chat_template(messages, enable_thinking=True) == default
    assert t.decode(off).endswith("assistant\n<think>\n\n</think>\n\n")
    assert t.decode(default).endswith("assistant\n")


def test_errors_name_what_is_wrong(tmp_path) -> None:
    with pytest.raises(ValueError, match="'tool'"):
        tokenizer().apply_chat_template([{"role": "tool", "content": ""}])
    with pytest.raises(ValueError, match="token id 400"):
        tokenizer().token(400)
    with pytest.raises(ValueError, match="vocab_size = 290"):
        Tokenizer.train([TEXT], vocab_size=290)
    with pytest.raises(ValueError, match="use more text"):
        Tokenizer.train(["abc"], vocab_size=600)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path / "tokenizer.json")
