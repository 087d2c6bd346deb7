"""Text to token ids and back: byte-pair encoding with byte fallback, and the ChatML turns of MiniCPM4.1.

BPE starts from single characters and repeatedly joins the most frequent adjacent pair. A character that the vocabulary
does not know falls back to its UTF-8 bytes, `<0x00>` ... `<0xFF>`, so every text has an encoding and decoding gives the
text back.

The special tokens `<s>`, `</s>`, `<|im_start|>` and `<|im_end|>` are never produced from text: a document that merely
contains the characters "</s>" must not end the sequence, and a user's message must not be able to open a system turn.

The algorithm runs in the `tokenizers` library; this file trains it, loads a published `tokenizer.json`, and holds the
template. Sources: Sennrich et al., arXiv 1508.07909; the ids and turns published with MiniCPM4.1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as _Tokenizer

from minicpm_ref.files import write_text

UNK, BOS, EOS, TURN, END_OF_TURN = "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ROLES = ("system", "user", "assistant")

# One pre-token is: a line break with the indentation behind it; a word with the one sign before it (".append", "_name",
# " if"); up to three digits; a run of signs; a run of blanks. Merges never cross these borders.
WORDS = r"[\r\n]+[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"


class Tokenizer:
    """A trained vocabulary. `bos_id` starts a text, `eos_ids` are the ids that end generation."""

    def __init__(self, backend: _Tokenizer):
        backend.encode_special_tokens = True  # special tokens spelled out in a text are ordinary characters
        self._backend = backend
        self.bos_id = self._required_id(BOS)
        self.eos_ids = tuple(i for i in (backend.token_to_id(EOS), backend.token_to_id(END_OF_TURN)) if i is not None)

    def end_at(self, ids: Iterable[int]) -> None:
        """Let these ids end generation, too: configs often name more of them than the vocabulary does."""
        self.eos_ids = tuple(dict.fromkeys((*self.eos_ids, *ids)))

    def _required_id(self, token: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None:
            raise ValueError(f"the vocabulary has no token {token!r}")
        return found

    # ---- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`, ours or a published one. Raises FileNotFoundError or ValueError naming the file."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file (expected a tokenizer.json)")
        try:
            return cls(_Tokenizer.from_str(path.read_text("utf-8")))
        except Exception as error:  # the library raises bare Exception for malformed files
            raise ValueError(f"{path}: not a tokenizer.json that can be read ({error})") from error

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json`, atomically."""
        write_text(path, self._backend.to_str(pretty=False))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 4096, alphabet: int = 200) -> Tokenizer:
        """Learn a vocabulary of exactly `vocab_size` tokens from `texts`.

        The `alphabet` most frequent characters get a token of their own; the others are spelled in bytes.
        Raises ValueError when the texts are too small to fill the vocabulary.
        """
        fixed = [UNK, BOS, EOS, *BYTES, TURN, END_OF_TURN]
        learned = vocab_size - len(fixed)
        if learned < alphabet:
            raise ValueError(f"vocab_size = {vocab_size}: expected at least {len(fixed) + alphabet}")
        trainer = trainers.BpeTrainer(vocab_size=learned, limit_alphabet=alphabet, show_progress=False)
        backend = _Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
        backend.train_from_iterator(texts, trainer)
        model = json.loads(backend.to_str())["model"]
        if len(model["vocab"]) != learned:
            raise ValueError(
                f"the texts give {len(model['vocab'])} tokens: expected {learned}; "
                "use more text or a smaller vocab_size"
            )
        words = sorted(model["vocab"], key=model["vocab"].get)
        vocab = {token: i for i, token in enumerate([*fixed, *words])}
        merges = [tuple(pair) for pair in model["merges"]]
        backend = _Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=UNK, byte_fallback=True))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        backend.add_special_tokens([UNK, BOS, EOS, TURN, END_OF_TURN])
        return cls(backend)

    # ---- text --------------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self._backend.get_vocab_size()

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of `text`, behind `<s>` unless `add_bos=False`."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if add_bos else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without `<s>`; runs on all cores."""
        return [encoding.ids for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens give nothing, bytes that are not UTF-8 give U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def token(self, token_id: int) -> str:
        """How one id is spelled in the vocabulary. Raises ValueError for an id outside it."""
        found = self._backend.id_to_token(token_id)
        if found is None:
            raise ValueError(f"token id {token_id}: expected 0 <= id < {self.vocab_size}")
        return found

    # ---- chat --------------------------------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation in ChatML turns, ready for generation.

        `messages` are {"role": "system" | "user" | "assistant", "content": text}. MiniCPM4.1 reasons before it answers
        unless it is told not to: `enable_thinking=False` opens the answer with an empty thought, which is how the
        template says so. Raises ValueError for an unknown role.
        """
        turn, end = self._required_id(TURN), self._required_id(END_OF_TURN)
        ids = [self.bos_id]
        for message in messages:
            if message["role"] not in ROLES:
                raise ValueError(f"role {message['role']!r}: expected one of {', '.join(ROLES)}")
            ids += [turn, *self.encode(f"{message['role']}\n{message['content']}", add_bos=False), end]
            ids += self.encode("\n", add_bos=False)
        if add_generation_prompt:
            opening = "assistant\n" + ("<think>\n\n</think>\n\n" if enable_thinking is False else "")
            ids += [turn, *self.encode(opening, add_bos=False)]
        return ids


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Pieces of text as `tokens` arrive; a character whose bytes are not complete yet waits for the rest."""
    ids: list[int] = []
    shown = 0
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[shown:]
            shown = len(text)
    yield tokenizer.decode(ids)[shown:]
