"""AdamW and Muon with muP parameter groups, and the warmup-stable-decay schedule.

muP says which learning rate each matrix needs so that one base rate fits every width: embeddings, output matrix and
norms take the base rate, the matrices inside the layers take it divided by C / dim_model_base under AdamW. Muon instead
replaces the update of those matrices by the nearest orthogonal matrix, whose size does not depend on the width at all.

Sources: MiniCPM, arXiv 2404.06395 sections 3 and 4 (muP, WSD); Jordan et al. 2024, "Muon" (Newton-Schulz coefficients).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from minicpm_ref.config import ModelConfig


def wsd_factor(step: int, steps: int, warmup_steps: int, decay_steps: int) -> float:
    """Learning-rate factor in [0, 1]: linear warmup, constant, then linear decay that would reach 0 at `steps`.

    `step` counts from 0 and is less than `steps`.
    """
    return min(1.0, (step + 1) / max(1, warmup_steps), (steps - step) / max(1, decay_steps))


def orthogonalize(matrices: Tensor, iterations: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Push the singular values of `matrices` [..., R, S] towards 1, keeping the singular vectors.

    Newton-Schulz iteration with the quintic of the Muon report: an odd polynomial of the matrix acts on its singular
    values alone. They end between about 0.7 and 1.2, which is as good as exact in practice. Runs in `dtype`, or in
    float64 for float64 matrices; bfloat16 takes a quarter of the time where it is multiplied in hardware. Returns the
    dtype of `matrices`.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(torch.promote_types(matrices.dtype, torch.float32))  # the norm of a large matrix is a long sum
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).contiguous()
    if x.dtype == torch.float32:
        x = x.to(dtype)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised; for 2-D weights inside layers only.

    `lr` is the size of each singular value of the update (times sqrt(rows / columns) for tall matrices); decay is
    decoupled. Matrices of one shape are stacked, so a layer costs a few batched products, in `dtype`. torch.optim.Muon
    does the same one matrix at a time and always in bfloat16, which a CPU without bfloat16 instructions emulates
    several times slower.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                nesterov = parameter.grad.lerp(buffer, group["momentum"])
                by_shape[parameter.shape].append((parameter, nesterov))
            for shape, pairs in by_shape.items():
                updates = orthogonalize(torch.stack([update for _, update in pairs]), dtype=self.dtype)
                size = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-size)


def build_optimizers(
    model: nn.Module,
    config: ModelConfig,
    kind: str,
    lr: float,
    matrix_lr: float,
    weight_decay: float,
    dtype: torch.dtype = torch.float32,
) -> list[torch.optim.Optimizer]:
    """The optimizers of a run, with each group's muP learning rate under "base_lr".

    `kind` is "muon" (matrices by Muon at `matrix_lr`, orthogonalised in `dtype`, the rest by AdamW at `lr`) or "adamw"
    (matrices at `lr` * dim_model_base / C). Raises ValueError for another kind.
    """
    if kind not in ("muon", "adamw"):
        raise ValueError(f"optimizer {kind!r}: expected 'muon' or 'adamw'")
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".layers." in f".{name}" else others).append(parameter)
    groups: list[dict[str, object]] = [{"params": others, "lr": lr, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = []
    if kind == "adamw":
        # decay is multiplied by the rate: with the rate alone divided, wide models would decay less
        rate, decay = lr / config.logit_divisor, weight_decay * config.logit_divisor
        groups.append({"params": matrices, "lr": rate, "weight_decay": decay})
    else:
        optimizers.append(Muon(matrices, lr=matrix_lr, weight_decay=weight_decay, dtype=dtype))
    optimizers.append(torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers
