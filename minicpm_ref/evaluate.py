"""How good a model is: bits per byte of text that it was not trained on, whole and by file group.

Bits per byte is the negative log2-likelihood of a text divided by its length in UTF-8 bytes. Unlike loss per token it
does not depend on the vocabulary, so models with different tokenizers can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from minicpm_ref.data import Corpus
from minicpm_ref.model import MiniCPM
from minicpm_ref.tokenizer import Tokenizer


@torch.no_grad()
def bits_per_byte(
    model: MiniCPM, tokenizer: Tokenizer, texts: Sequence[str], context: int = 512, batch_tokens: int = 8192
) -> float:
    """Held-out loss of `texts` in bits per UTF-8 byte.

    Each text starts behind `<s>` and is cut into windows of `context` tokens, each predicted from its own beginning, so
    every token is counted once; a longer window gives a lower, equally valid number. Raises ValueError when there is no
    text.
    """
    windows: list[list[int]] = []
    for text_ids in tokenizer.encode_batch(texts):
        line = [tokenizer.bos_id, *text_ids]
        windows += [line[start : start + context + 1] for start in range(0, len(line) - 1, context)]
    if not windows:
        raise ValueError("no text to measure: every text given is empty")
    windows.sort(key=len, reverse=True)
    nats = 0.0
    rows = max(1, batch_tokens // context)
    for start in range(0, len(windows), rows):
        batch = windows[start : start + rows]
        ids = torch.full((len(batch), len(batch[0])), -100)
        for row, window in enumerate(batch):
            ids[row, : len(window)] = torch.tensor(window)
        ids = ids.to(model.device)
        logits = model(ids[:, :-1].clamp(min=0))  # what stands right of a window's end cannot be seen by it
        nats += F.cross_entropy(
            logits.float().flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        ).item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def quality_by_group(model: MiniCPM, corpus: Corpus, context: int) -> dict[str, float]:
    """Held-out bits per byte of each file group, and of "all" bytes together."""
    quality: dict[str, float] = {}
    bits = nbytes = 0.0
    for group in dict.fromkeys(document.group for document in corpus.held_out):
        documents = [document for document in corpus.held_out if document.group == group]
        size = sum(document.nbytes for document in documents)
        value = bits_per_byte(model, corpus.tokenizer, [document.text for document in documents], context)
        quality[group] = round(value, 4)
        bits, nbytes = bits + value * size, nbytes + size
    return quality | {"all": round(bits / nbytes, 4)}
