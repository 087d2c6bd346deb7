"""The vocabulary and the chat template that a GGUF file carries, as a `Tokenizer`.

Two kinds are in use. `gpt2` is byte-level BPE: tokens in GPT-2's byte alphabet, merges in order, and the *name* of the
rule that cuts a text into words (`smollm`, `llama-bpe`, ...); the rule itself stands in no file, so the names that are
understood are listed here and others are refused. `llama` is SentencePiece's BPE: pieces with scores, no merges. There
the pair is joined whose piece has the best score, so the merges are all ways to make a piece of two others, best first.

Left out: unigram models, WordPiece, RWKV. Sources: the GGUF specification; the rules as llama.cpp names them
(src/llama-vocab.cpp) and transformers writes them; transformers' conversion of SentencePiece scores to merges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from minicpm_ref.published import require, require_list
from minicpm_ref.tokenizer import BLANK, Tokenizer

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type
_LETTERS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(numbers: str) -> Any:
    words = pre_tokenizers.Split(Regex(f"{_CONTRACTIONS}|{numbers}{_REST}"), "isolated")
    return pre_tokenizers.Sequence([words, _LETTERS])


def _words(name: str) -> Any:
    """How `tokenizer.ggml.pre` = `name` cuts a text into the words that merges do not cross."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    match name:
        case "default" | "gpt-2":
            return gpt2
        case "smollm":
            return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
        case "llama-bpe" | "llama3":
            return _split(r"\p{N}{1,3}")
        case "qwen2":
            return _split(r"\p{N}")
    raise ValueError(f"tokenizer.ggml.pre = {name!r}: expected gpt-2, smollm, llama-bpe or qwen2")


def read_vocabulary(fields: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer that the keys of a GGUF header describe; None without one. Raises ValueError naming the key."""
    if fields.get("tokenizer.ggml.model") in (None, "none"):
        return None
    kind = require("tokenizer.ggml.model", fields["tokenizer.ggml.model"], str)
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model = {kind!r}: expected 'gpt2' or 'llama'")
    tokens = require_list("tokenizer.ggml.tokens", fields.get("tokenizer.ggml.tokens"), str)
    types = require_list("tokenizer.ggml.token_type", fields.get("tokenizer.ggml.token_type") or [1] * len(tokens), int)
    if len(types) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type holds {len(types)} entries for {len(tokens)} tokens")
    rule = require("tokenizer.ggml.pre", fields.get("tokenizer.ggml.pre", "default"), str)
    backend = _byte_level(fields, tokens, rule) if kind == "gpt2" else _with_scores(fields, tokens, types)
    backend.add_special_tokens([token for token, t in zip(tokens, types, strict=True) if t in (CONTROL, UNKNOWN)])
    backend.add_tokens([token for token, t in zip(tokens, types, strict=True) if t == USER_DEFINED])

    def spelled(name: str) -> str | None:
        number = fields.get(f"tokenizer.ggml.{name}_token_id")
        return None if number is None else tokens[require(name, number, int, low=0, high=len(tokens) - 1)]

    starts = fields.get("tokenizer.ggml.add_bos_token", kind == "llama" or rule in ("llama-bpe", "llama3"))
    settings = {
        "bos_token": spelled("bos") or spelled("eos"),
        "eos_token": spelled("eos"),
        "add_bos_token": require("tokenizer.ggml.add_bos_token", starts, bool),
        "chat_template": fields.get("tokenizer.chat_template"),
    }
    return Tokenizer(backend, settings)


def _byte_level(fields: Mapping[str, Any], tokens: Sequence[str], rule: str) -> Backend:
    merges = require_list("tokenizer.ggml.merges", fields.get("tokenizer.ggml.merges"), str)
    pairs = [tuple(merge.split(" ")) for merge in merges]  # a blank inside a token is spelled by a letter
    wrong = next((merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2), None)
    if wrong is not None:
        raise ValueError(f"tokenizer.ggml.merges holds {wrong!r}: expected two tokens and one blank")
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocab, merges=pairs, ignore_merges=rule in ("llama-bpe", "llama3")))
    backend.pre_tokenizer = _words(rule)
    backend.decoder = decoders.ByteLevel()
    return backend


def _with_scores(fields: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Backend:
    scores = require_list("tokenizer.ggml.scores", fields.get("tokenizer.ggml.scores"), float)
    if len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml.scores holds {len(scores)} entries for {len(tokens)} tokens")
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = merges_of_scores(tokens, scores, types)
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, byte_fallback=True, fuse_unk=True))
    prefix = require("add_space_prefix", fields.get("tokenizer.ggml.add_space_prefix", True), bool)
    blanks = normalizers.Replace(" ", BLANK)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), blanks]) if prefix else blanks
    steps: list[Any] = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return backend


def merges_of_scores(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """All ways to make a piece of two others, best piece first; of equal scores the earlier token first."""
    normal = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind in (1, USER_DEFINED)}
    found = []
    for piece, i in normal.items():
        for cut in range(1, len(piece)):
            left, right = normal.get(piece[:cut]), normal.get(piece[cut:])
            if left is not None and right is not None:
                found.append((-scores[i], i, left, right))
    return [(tokens[left], tokens[right]) for _, _, left, right in sorted(found)]
