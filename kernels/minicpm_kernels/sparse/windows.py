"""The arithmetic of windows and blocks that every kernel of this room needs, in one place and without Triton."""

from __future__ import annotations

import math
from typing import Protocol

COARSE_FACTOR = 4  # coarse windows are 4x as long and 4x as far apart
LOG2_E = math.log2(math.e)  # exp(x) = 2^(x LOG2_E), and processors have 2^x


class Settings(Protocol):
    """The fields of `minicpm_ref.config.SparseConfig` that the kernels read."""

    @property
    def kernel_size(self) -> int: ...
    @property
    def kernel_stride(self) -> int: ...
    @property
    def init_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def topk(self) -> int: ...
    @property
    def exact_lse(self) -> bool: ...
    @property
    def local_inclusive(self) -> bool: ...
    @property
    def window_blocks(self) -> int: ...
    @property
    def visible_blocks(self) -> int: ...


def window_count(tokens: int, size: int, stride: int) -> int:
    """How many complete windows of `size` tokens, `stride` apart, fit into `tokens` tokens."""
    return max(0, (tokens - size) // stride + 1)


def local_reach(settings: Settings) -> int:
    """The forced band is own - local_reach .. own, in blocks."""
    return settings.window_blocks - (0 if settings.local_inclusive else 1)
