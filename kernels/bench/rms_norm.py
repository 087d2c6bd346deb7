"""RMSNorm, alone and with the residual add: the Triton kernel, torch's own, and the reference written as torch
operations.

Prediction: the work is bound by bytes. rms_norm moves 2 C numbers a row, add_rms_norm 4 C; the reference, an
operation at a time, moves each intermediate twice. The rows record the bytes that must move, so that the figure shows
bandwidth reached against the bandwidth of a plain copy of the same size, which is measured in the same run.

Run: python kernels/bench/rms_norm.py [--device cuda] [--rounds 20]. On a CPU the Triton kernel is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import measure, write_results

from minicpm_ref.cases import AddNormCase, NormCase
from minicpm_ref.ops import add_rms_norm, rms_norm

WIDTHS = (1024, 4096)  # MiniCPM4-0.5B and 8B
TOKENS = {"cuda": (1, 16, 1024, 16384), "cpu": (1, 16, 256)}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


def torch_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """What a user would pick instead."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def torch_add_rms_norm(
    residual: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a user would pick instead: torch has the norm, and no fusion with the add."""
    hidden = torch.add(residual, branch, alpha=scale)
    return hidden, torch_rms_norm(hidden, weight, eps)


REFERENCES: dict[str, Callable[..., Any]] = {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm}
PEERS: dict[str, Callable[..., Any]] = {"rms_norm": torch_rms_norm, "add_rms_norm": torch_add_rms_norm}
CASES: dict[str, type[NormCase]] = {"rms_norm": NormCase, "add_rms_norm": AddNormCase}
TENSORS = {"rms_norm": 2, "add_rms_norm": 4}  # of the size of x, read or written


def candidates(function: str, device: str) -> dict[str, Callable[..., Any]]:
    """Name -> implementation of `function` on this device."""
    found = {"reference": REFERENCES[function], "torch": PEERS[function]}
    if device == "cuda":
        from minicpm_kernels import ops as kernels

        found["triton"] = getattr(kernels, function)
    return found


def copy_speed(shape: tuple[int, ...], dtype: torch.dtype, device: str, rounds: int) -> dict[str, float]:
    """Time of x.clone(): two bytes of traffic for each byte of x, the floor that the norm is compared with."""
    x = torch.ones(shape, dtype=dtype, device=device)
    return measure({"copy": torch.clone}, torch.clone, (x,), device, rounds)["copy"]


def main() -> None:
    parser = argparse.ArgumentParser(description="time RMSNorm")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--rounds", type=int, default=20)
    chosen = parser.parse_args()
    dtype = DTYPES[chosen.device]
    rows = []
    for width in WIDTHS:
        for tokens in TOKENS[chosen.device]:
            shape = (tokens, width)
            size = torch.finfo(dtype).bits // 8
            row = {"function": "copy", "implementation": "torch", "tokens": tokens, "width": width}
            time = copy_speed(shape, dtype, chosen.device, chosen.rounds)
            rows.append(row | {"bytes": 2 * tokens * width * size} | time)
            for function, case in CASES.items():
                arguments = case("bench", shape).build(dtype, chosen.device)
                implementations = candidates(function, chosen.device)
                moved = (TENSORS[function] * tokens + 1) * width * size  # one more row: the weight
                with torch.no_grad():
                    times = measure(implementations, REFERENCES[function], arguments, chosen.device, chosen.rounds)
                for name, time in times.items():
                    row = {"function": function, "implementation": name, "tokens": tokens, "width": width}
                    rows.append(row | {"bytes": moved} | time)
                    print(f"{function:<13} {name:<10} {tokens:>6} x {width:<5} {time['median_us']:>9.1f} us")
    settings = {"dtype": str(dtype).removeprefix("torch."), "rounds": chosen.rounds, "seed": 0}
    path = write_results(f"rms_norm_{chosen.device}", chosen.device, settings, rows)
    print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
