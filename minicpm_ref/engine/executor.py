"""The border between *what* an engine does and *how* a model is run.

Problem. An engine samples, streams, batches, reuses prefixes, drafts and verifies. A backend multiplies matrices on one
kind of device. Where the two are written as one program, every feature is written once a backend, and each copy has its
own faults.

Idea. One small protocol between them, in numpy arrays and lists of integers. A model is a static cache of `batch` rows;
a row holds up to `max_length` tokens; four calls put tokens into rows and give logits back (`prefill`, `decode`,
`verify`), two take tokens away (`truncate`, `keep`). Sampling, stop strings, speculation and scheduling see nothing
else, so they are written once, and a new backend is one class.

What an executor promises:

- **Rows are independent.** What one row computes depends on its own tokens alone: never on its neighbours, on the
  allocation, or on how a prompt was cut into chunks. Sums may be made in another order, so equality is that of
  floating-point arithmetic, not of bits.
- **Nothing is read before it is written.** `truncate` moves a mark and touches no memory; whatever lies behind the mark
  has no influence.
- **Dense or sparse, short or long angles.** A model with `sparse_config` attends densely in a sequence of fewer than
  `dense_len` tokens and sparsely from there on; LongRoPE has another list of angles beyond its original length. What
  counts for a prompt is its *final* length, which its first chunk cannot know: `final_length` says it. For a token that
  is decoded it is the position plus one, and so it must be for one that is verified: drafts stop before
  `config.next_border`.
- **One thread.** An executor is called by one thread at a time; the engine sees to that.

The reference implementation of the protocol is `torch_executor.TorchExecutor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from minicpm_ref.config import ModelConfig

Logits = NDArray[np.float32]


class Executor(Protocol):
    """A model with a static cache of `batch` rows of up to `max_length` tokens.

    Every method raises ValueError for a row, an id or a length that does not exist, before it changes anything.
    """

    config: ModelConfig
    batch: int
    max_length: int

    def prefill(self, row: int, ids: Sequence[int], final_length: int | None = None) -> Logits:
        """Append `ids` to a row, in chunks if need be; logits [V] of the last of them.

        `final_length`: how many tokens the row will hold when its prompt is complete (None: this call completes it).
        """
        ...

    def decode(self, rows: Sequence[int], ids: Sequence[int]) -> Logits:
        """Append one token to each of several different rows; logits [len(rows), V]."""
        ...

    def verify(self, row: int, ids: Sequence[int], parents: Sequence[int] | None = None) -> Logits:
        """Append n tokens to a row and give the logits [n, V] of all of them.

        `parents` None: a chain, each token follows the one before it. Otherwise a tree: token i follows token
        `parents[i]` < i of this call, or the row's last token if that is -1, and sees its ancestors only; its position
        is that of its parent plus one. All n tokens are in the row afterwards: after a tree `keep` must follow.
        """
        ...

    def keep(self, row: int, base: int, path: Sequence[int]) -> None:
        """Of the tokens that `verify` wrote from length `base` on, keep those with the ascending indices `path`; the
        row then holds base + len(path) tokens."""
        ...

    def truncate(self, row: int, length: int) -> None:
        """Forget a row's tokens from `length` on."""
        ...

    def length(self, row: int) -> int:
        """How many tokens a row holds."""
        ...

    def hidden(self, row: int, layers: Sequence[int]) -> NDArray[np.float32]:
        """Residual streams [len(layers), n, C] of the n tokens that the row's last call appended.

        Layers count as in `MiniCPM.hidden_states`: 0 is the embedding, i what the first i layers made of it. Raises
        RuntimeError for an executor that was not built to keep them.
        """
        ...

    def memory(self) -> dict[str, int]:
        """Bytes of the "weights", the "cache" and the "scratch" memory."""
        ...


def depths(parents: Sequence[int]) -> list[int]:
    """Depth of each node of a draft tree, 0 for children of the row's last token. Raises ValueError for a parent that
    does not come first.

    >>> depths([-1, 0, 0, 2])
    [0, 1, 1, 2]
    """
    found: list[int] = []
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            raise ValueError(f"parents[{node}] = {parent}: expected -1 (the row's last token) or an earlier token")
        found.append(0 if parent < 0 else found[parent] + 1)
    return found


def check_tokens(executor: Executor, row: int, ids: Sequence[int], length: int) -> None:
    """Raise ValueError unless `ids` are known tokens that fit into `row` behind its `length` tokens."""
    if not 0 <= row < executor.batch:
        raise ValueError(f"row = {row}: expected 0 <= row < {executor.batch}")
    if len(ids) == 0:
        raise ValueError("ids is empty: expected at least one token")
    if min(ids) < 0 or max(ids) >= executor.config.vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(f"token id {wrong}: expected 0 <= id < {executor.config.vocab_size}")
    if length + len(ids) > executor.max_length:
        raise ValueError(f"row {row}: {length} + {len(ids)} tokens exceed max_length = {executor.max_length}")
