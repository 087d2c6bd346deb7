"""References of operations that kernels fuse: several steps of the decoder in one function.

The problem: on a GPU an elementwise step costs what its bytes cost. A residual add and then an RMSNorm, as two steps,
move 3 + 2 tensors of the size of the hidden state (read residual, read branch, write hidden; read hidden, write
normed). Fused, the hidden state is normalised while it is still in registers: 2 are read and 2 written, which is at
best 5 / 4 = 1.25 times faster.
The idea: a fused kernel needs a reference with its own name and signature; it stands here, composed of the plain
functions.

MiniCPM scales each residual branch by scale_depth / sqrt(layers) (muP; MiniCPM, arXiv 2404.06395), so the scale is
part of the add.
"""

from __future__ import annotations

from torch import Tensor

from minicpm_ref.model import rms_norm


def add_rms_norm(residual: Tensor, branch: Tensor, weight: Tensor, eps: float, scale: float) -> tuple[Tensor, Tensor]:
    """hidden = residual + scale * branch, and its RMSNorm: the end of one residual branch and the start of the next.

    residual, branch [..., C] of one dtype; weight [C]. Returns (hidden, normed), both [..., C] in the dtype of
    `residual`. The sum is taken in float32; `hidden` is rounded once, and normed from the unrounded sum.
    """
    hidden = residual.float() + scale * branch.float()
    return hidden.to(residual.dtype), rms_norm(hidden, weight.float(), eps).to(residual.dtype)
