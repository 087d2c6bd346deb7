"""FR-Spec: a draft head that knows the frequent tokens only.

Problem. A draft head's largest matrix is its output: with 73,448 tokens it is most of what a draft step reads.

Idea. Text uses few tokens often. Keep the rows of the most frequent ones; the rest can never be drafted, and is
produced by the target as always. Nothing about the text changes (the target still chooses among all tokens), only how
often a draft is right: never more often than the share of the text that the kept tokens cover.

Kept ids are sorted and stored as offsets, `d2t[i] = id_i - i`, the form in which published heads carry them.

Sources: FR-Spec, arXiv 2502.14856; MiniCPM4 technical report (arXiv 2506.07900) section 4.1.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minicpm_ref.speculative.draft_head import DraftHead


@dataclass(frozen=True)
class Coverage:
    """What a vocabulary of `size` of `full` tokens is worth: `share` of the counted occurrences that it covers."""

    size: int
    full: int
    share: float

    def __str__(self) -> str:
        kept = self.size / self.full
        return f"{self.size} of {self.full} tokens ({kept:.1%}) cover {self.share:.1%} of the text"


def count_tokens(ids: Iterable[Sequence[int] | Tensor], vocab_size: int) -> Tensor:
    """How often each token occurs in the sequences `ids`, int64 [V]. Raises ValueError for an id beyond V."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for sequence in ids:
        own = torch.bincount(torch.as_tensor(sequence, dtype=torch.int64), minlength=vocab_size)
        if len(own) > vocab_size:
            raise ValueError(f"token id {len(own) - 1}: expected ids below {vocab_size}")
        counts += own
    return counts


def frequent_tokens(counts: Tensor, size: int, always: Sequence[int] = ()) -> Tensor:
    """The `size` most frequent tokens, ascending int64 [size], among them every one of `always` (stop ids, markers).

    Of equally frequent tokens the lower id is kept. Raises ValueError where `size` cannot be met.

    >>> frequent_tokens(torch.tensor([5, 0, 9, 0, 7]), 3, always=[3]).tolist()
    [2, 3, 4]
    """
    forced = sorted(set(always))
    if not max(len(forced), 1) <= size <= len(counts):
        raise ValueError(f"size = {size}: expected {max(len(forced), 1)} (those of `always`) to {len(counts)}")
    if forced and not 0 <= forced[0] <= forced[-1] < len(counts):
        raise ValueError(f"always = {forced}: expected ids below {len(counts)}")
    ranked = counts.clone()
    ranked[forced] = counts.max() + 1
    return ranked.sort(descending=True, stable=True).indices[:size].sort().values


def coverage(counts: Tensor, kept: Tensor) -> Coverage:
    """Which share of what `counts` [V] counted the tokens `kept` are."""
    return Coverage(len(kept), len(counts), float(counts[kept].sum() / counts.sum().clamp(min=1)))


def offsets(kept: Tensor) -> Tensor:
    """`d2t` of ascending ids: what to add to a draft id.

    >>> offsets(torch.tensor([0, 2, 5, 7])).tolist()
    [0, 1, 3, 4]
    """
    if bool((kept.diff() <= 0).any()):
        raise ValueError("kept tokens must ascend without repetition: sort them first")
    return kept - torch.arange(len(kept), device=kept.device)


def trim_head(head: DraftHead, kept: Tensor) -> DraftHead:
    """A copy of `head` that can only say the target tokens `kept`, ascending.

    No training: rows of the output matrix are gathered, everything else is shared. Raises ValueError for a token that
    the head does not know.
    """
    places = torch.searchsorted(head.vocabulary, kept).clamp(max=len(head.d2t) - 1)
    unknown = kept[head.vocabulary[places] != kept]
    if len(unknown):
        raise ValueError(f"token {int(unknown[0])} is not in the head's vocabulary ({len(unknown)} such tokens)")
    config = dataclasses.replace(head.config, draft_vocab_size=len(kept))
    with torch.device("meta"):
        trimmed = DraftHead(config, head.embedding)
    tensors = dict(head.state_dict())
    tensors |= {"lm_head.weight": head.lm_head.weight.detach()[places], "d2t": offsets(kept)}
    trimmed.load_state_dict(tensors, assign=True)
    return trimmed.requires_grad_(False).eval()
