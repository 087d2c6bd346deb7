"""Text to token ids and back: byte-pair encoding, end tokens, chat turns.

BPE starts from single characters and repeatedly joins the most frequent adjacent pair. Three spellings are in use.
Ours: pieces are their text, and a character that the vocabulary does not know falls back to its UTF-8 bytes, `<0x00>`
... `<0xFF>`. SentencePiece's, as in Llama 2: the same with U+2581 for a blank, and often one blank put before every
text. GPT-2's, as in SmolLM2: a letter of its own for each of the 256 bytes. In all of them a token is a string of
bytes, and decoding is nothing but joining those; a text is what all the bytes mean, so a character may come in parts.

The special tokens, such as `<s>`, `</s>`, `<|im_start|>` and `<|im_end|>`, are never produced from text: a document
that merely contains the characters "</s>" must not end the sequence, and a user's message must not be able to open a
system turn.

The algorithm runs in the `tokenizers` library; this file trains it, loads a published `tokenizer.json` (and the
`tokenizer_config.json` beside it), and holds MiniCPM4.1's turns, which count where no template is published. Sources:
Sennrich et al., arXiv 1508.07909; the ids and turns published with MiniCPM4.1; GPT-2's byte alphabet.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as _Tokenizer

from minicpm_ref.chat_template import free_mark, plain_messages, render, split
from minicpm_ref.files import write_text
from minicpm_ref.published import read_json, require

UNK, BOS, EOS, TURN, END_OF_TURN = "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
BLANK = "\u2581"  # SentencePiece's spelling of a blank

# One pre-token is: a line break with the indentation behind it; a word with the one sign before it (".append", "_name",
# " if"); up to three digits; a run of signs; a run of blanks. Merges never cross these borders.
WORDS = r"[\r\n]+[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"

CHATML = (  # MiniCPM4.1's turns
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)


class Tokenizer:
    """A vocabulary. `bos_id` stands for the start of a text (`add_bos`: whether encoding puts it there unless told
    otherwise), `eos_ids` are the ids that end generation.

    `settings` are the keys of a published `tokenizer_config.json` that count here: `bos_token`, `eos_token`,
    `add_bos_token`, `chat_template`. Raises ValueError for a vocabulary of another kind.

    >>> tokenizer = Tokenizer.load("tokenizer.json")
    >>> tokenizer.decode(tokenizer.encode("def add(a, b):"))
    'def add(a, b):'
    """

    def __init__(self, backend: _Tokenizer, settings: Mapping[str, Any] | None = None):
        backend.encode_special_tokens = True  # special tokens spelled out in a text are ordinary characters
        backend.no_truncation()  # fine-tuning tools leave theirs in the file, and texts would be cut without a word
        backend.no_padding()
        self._backend = backend
        self.settings = {name: (settings or {}).get(name) for name in _SETTINGS}
        self._special = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self._bytes, self._prefix = _token_bytes(backend, set(self._special.values()))
        self.bos_id = self._required_id(self.settings["bos_token"] or BOS)
        ends = dict.fromkeys((self.settings["eos_token"] or EOS, EOS, END_OF_TURN))
        self.eos_ids = tuple(self._special[token] for token in ends if token in self._special)
        added = self.settings["add_bos_token"]
        self.add_bos = (not settings or backend.encode("a").ids[:1] == [self.bos_id]) if added is None else added

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
        beside = path.with_name("tokenizer_config.json")
        settings = _read_settings(beside) if beside.is_file() else None
        try:
            return cls(_Tokenizer.from_str(path.read_text("utf-8-sig")), settings)
        except Exception as error:  # the library raises bare Exception for malformed files
            raise ValueError(f"{path}: not a tokenizer.json that can be read ({error})") from error

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json`, atomically, and the settings beside it if there are any."""
        write_text(path, self._backend.to_str(pretty=False))
        settings = {name: value for name, value in self.settings.items() if value is not None}
        if settings:
            write_text(Path(path).with_name("tokenizer_config.json"), json.dumps(settings, indent=2))

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

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids of `text`; `add_bos` None puts the start token before it if the publisher does (`self.add_bos`)."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if (self.add_bos if add_bos is None else add_bos) else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without the start token; runs on all cores."""
        return [encoding.ids for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], continues: bool = False) -> str:
        """The text of `ids`; special tokens give nothing, bytes that are not UTF-8 give U+FFFD.

        A vocabulary that puts a blank before every text takes it away again, unless the ids continue a text.
        """
        return "".join(stream_text(self, ids, continues))

    def token_bytes(self, token_id: int) -> bytes:
        """What one id adds to a text, in UTF-8: a part of a character, or several; nothing for a special token and for
        the ids by which an embedding is larger than its vocabulary."""
        return self._bytes.get(token_id, b"")

    def token(self, token_id: int) -> str:
        """How one id is spelled in the vocabulary. Raises ValueError for an id outside it."""
        found = self._backend.id_to_token(token_id)
        if found is None:
            raise ValueError(f"token id {token_id}: expected 0 <= id < {self.vocab_size}")
        return found

    # ---- chat --------------------------------------------------------------------------------------------------------

    @cached_property
    def _specials(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(t) for t in sorted(self._special, key=len, reverse=True)) or r"(?!)")

    @cached_property
    def _inside(self) -> _Tokenizer:
        """The backend for a text behind a special token: some put their blank before the first text only."""
        content = json.loads(self._backend.to_str())
        for part in _flat(content.get("pre_tokenizer"), "pretokenizers"):
            if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
                part["prepend_scheme"] = "never"
        inside = _Tokenizer.from_str(json.dumps(content))
        inside.encode_special_tokens = True
        return inside

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation, ready for generation: by the publisher's template, or in MiniCPM4.1's turns.

        `messages` are {"role": "system" | "user" | "assistant" | "tool", "content": text}; a content may also be a list
        of {"type": "text", "text": ...}. MiniCPM4.1 reasons before it answers unless it is told not to:
        `enable_thinking=False` opens the answer with an empty thought, which is how the template says so. The start
        token stands in front once, if the vocabulary adds one or the template does. Raises ValueError naming the
        message that is not understood.
        """
        plain = plain_messages(messages)
        template = self.settings["chat_template"]
        if template is None:
            self._required_id(TURN), self._required_id(END_OF_TURN)
            template = CHATML
        mark = free_mark([template, *(message["content"] for message in plain)])
        more: dict[str, Any] = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        more |= {name: self.settings[name] or usual for name, usual in (("bos_token", BOS), ("eos_token", EOS))}
        more["add_generation_prompt"] = add_generation_prompt
        text = render(template, plain, mark, self._specials, **more)
        ids: list[int] = []
        for is_special, piece in split(text, mark, self._specials):
            if is_special:
                ids.append(self._special[piece])
            else:
                ids += (self._inside if ids else self._backend).encode(piece, add_special_tokens=False).ids
        return [self.bos_id, *ids] if self.add_bos and ids[:1] != [self.bos_id] else ids


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int], continues: bool = False) -> Iterator[str]:
    """Pieces of text as `tokens` arrive; a character whose bytes are not complete yet waits for the rest. Joined they
    are `tokenizer.decode(tokens, continues)`."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    drop_blank = tokenizer._prefix and not continues
    for token in tokens:
        data = tokenizer.token_bytes(token)
        if drop_blank and data:
            data, drop_blank = data.removeprefix(b" "), False
        if text := decoder.decode(data):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def byte_letters() -> dict[str, int]:
    """GPT-2's alphabet {letter: byte}: printable Latin-1 stands for itself, other bytes for letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_SETTINGS = ("bos_token", "eos_token", "add_bos_token", "chat_template")


def _read_settings(path: Path) -> dict[str, Any]:
    """What counts of a `tokenizer_config.json` (and of the `chat_template.jinja` beside it)."""
    content = read_json(path)
    settings = {name: content.get(name) for name in _SETTINGS}
    try:
        for name in ("bos_token", "eos_token"):
            settings[name] = _spelling(settings[name])
        if settings["add_bos_token"] is not None:
            require("add_bos_token", settings["add_bos_token"], bool)
        if isinstance(settings["chat_template"], list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in settings["chat_template"]}
            settings["chat_template"] = named.get("default")
        if settings["chat_template"] is not None:
            require("chat_template", settings["chat_template"], str)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    apart = path.with_name("chat_template.jinja")
    if apart.is_file():
        settings["chat_template"] = apart.read_text("utf-8-sig")
    return settings


def _spelling(token: object) -> str | None:
    """A special token as files write it: its text, or an object that holds the text."""
    content = token.get("content") if isinstance(token, Mapping) else token
    if content is not None and not isinstance(content, str):
        raise ValueError(f"special token {token!r}: expected its text")
    return content


def _flat(part: Any, children: str) -> list[dict[str, Any]]:
    """The steps of a `tokenizer.json` component, those of its sequences one by one."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for child in part[children] for step in _flat(child, children)]


def _token_bytes(backend: _Tokenizer, special: set[int]) -> tuple[dict[int, bytes], bool]:
    """({id: its bytes}, whether the first blank of a text is not the text's), by the steps of the file's decoder."""
    content = json.loads(backend.to_str())
    steps = _flat(content["decoder"], "decoders")
    kinds = {step["type"] for step in steps}
    if not kinds or kinds - {"ByteLevel", "ByteFallback", "Fuse", "Replace", "Strip", "Metaspace"}:
        found_kinds = ", ".join(sorted(kinds)) or "None"
        raise ValueError(f"decoder {found_kinds}: expected byte-level BPE, or BPE with byte fallback")
    replaced = {step["pattern"].get("String"): step["content"] for step in steps if step["type"] == "Replace"}
    replaced |= {step["replacement"]: " " for step in steps if step["type"] == "Metaspace"}
    prefix = any(step["type"] == "Strip" and step["content"] == " " and step["start"] > 0 for step in steps)
    prefix |= any(step.get("prepend_scheme", "never") != "never" for step in steps)
    letters, byte = byte_letters(), {name: bytes([value]) for value, name in enumerate(BYTES)}
    literal = {token["id"] for token in content["added_tokens"]}  # spelled as they are, whatever the others are
    found = {}
    for token, i in backend.get_vocab().items():
        if i in special:
            continue
        if i in literal:
            found[i] = token.encode()
        elif "ByteLevel" in kinds:
            found[i] = bytes(letters[x] for x in token) if all(x in letters for x in token) else token.encode()
        elif "ByteFallback" in kinds and token in byte:
            found[i] = byte[token]
        else:
            for old, new in replaced.items():
                token = token.replace(old, new)
            found[i] = token.encode()
    return found, prefix
