"""Ternary matrix product on the CPU: this project's kernel, torch, ggml, and what the machine allows. (The GPU has
`ternary_matmul_gpu.py`.)

Prediction: at one token the product reads every weight once, so time = bytes / read bandwidth, and 2.125 bits a
weight against 16 or 32 make 7.5 and 15 times. Each further token costs only multiply-adds. A core that reads R bytes
and does G multiply-adds a second has spent the time of reading after 0.27 G / R tokens (0.27 bytes a weight): with 25
GB/s and 200 GMAC/s after two. From there the limit is the dot-product instruction, and what is left of the gain is
int8 against float32 or bfloat16 arithmetic.

How it is timed:
- copies of the weights that together exceed three times the last cache; every call takes the next one;
- all implementations take turns, in bursts of a few calls. Each burst begins with a pause and an untimed call: torch,
  numba and ggml each bring their own threads, and those of the last one go on spinning for milliseconds on the cores
  of the next;
- weights in huge pages for everybody, aligned to cache lines (in a program of your own, THP_MEM_ALLOC_ENABLE=1 makes
  torch ask for them);
- minimum and median over all calls, of which a slow candidate gets fewer; several threads up to four tokens, one
  beyond; activations are quantized inside the timed call where a method does that;
- every implementation is checked against float64 first.

ggml takes part when a package that bundles it is installed (pip install 'minicpm_ref[bench]'; see `ggml_peer`).
Codes and scales are such that all of ggml's types but Q4_0 hold the same weights: one scale for 256 of them.

Run: python kernels/bench/ternary_matmul.py [--threads 1 2] [--rounds 8] [--quick --out FOLDER]. It takes about ten
minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import DATA, cache_bytes, summary, write_results
from ggml_peer import TYPES, Ggml, GgmlProduct, find_ggml
from machine_limits import read_limit, vnni_peak

from minicpm_kernels.lowbit.ternary_cpu import INSTRUCTION_SET, ternary_matmul_int8
from minicpm_ref.checkpoint import variant_folder, variants
from minicpm_ref.config import ModelConfig
from minicpm_ref.lowbit.packing import scales_to_lanes, to_lanes
from minicpm_ref.lowbit.ternary import dequantize

SHAPES = {"4096x4096": (4096, 4096), "16384x4096": (16384, 4096), "4096x16384": (4096, 16384)}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256)
QUICK_SHAPES, QUICK_TOKENS = {"64x512": (64, 512)}, (1, 3)
GROUP_SIZE = 128
THREADED_TOKENS = 4  # beyond them arithmetic is the limit, and only the first number of threads is timed
MOST_COPIES = 512
LEAST_ROUNDS, MOST_SECONDS = 3, 1.0  # of calls; a candidate that has had both sits out the rounds that are left
PAUSE = 0.01  # seconds; longer than the threads of an OpenMP runtime spin
# relative error against float64 that is accepted: rounding of bfloat16, of int8 activations, of four-bit weights
ACCEPTED = {
    "torch_float32": 1e-5,
    "torch_bfloat16": 0.02,
    "ternary_int8": 0.015,
    "TQ1_0": 0.015,
    "TQ2_0": 0.015,
    "Q4_0": 0.15,
}


@dataclass
class Candidate:
    """One implementation, ready to multiply by copy number i."""

    call: Callable[[int], Any]
    output: Callable[[], torch.Tensor]
    weight_bytes: int
    copies: int
    close: Callable[[], None] = lambda: None


class Problem:
    """One matrix [out, in] in every form, each in as many copies as its size asks for."""

    def __init__(self, rows: int, columns: int, ggml: Ggml | None, rotate_over: int):
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
        half_scales = 0.01 + 0.02 * torch.rand(rows, columns // (2 * GROUP_SIZE), generator=generator)
        scales = half_scales.half().repeat_interleave(2, dim=1)  # one for 256 weights, as in ggml's ternary types
        self.rows, self.columns, self.rotate_over = rows, columns, rotate_over
        self.dense = dequantize(codes, scales, GROUP_SIZE)
        self.packed = self._copies((to_lanes(codes), scales_to_lanes(scales)))
        self.float32 = self._copies((self.dense,))
        self.bfloat16 = self._copies((self.dense.bfloat16(),))
        self.ggml = ggml
        self.ggml_packed = {kind: ggml.quantize(self.dense, kind) for kind in TYPES} if ggml else {}

    def candidates(self, x: torch.Tensor, threads: int) -> dict[str, Candidate]:
        """Every implementation of x [tokens, in] times the matrix."""
        short = x.bfloat16()
        found = {
            "ternary_int8": _torch_candidate(lambda codes, scales: ternary_matmul_int8(x, codes, scales), self.packed),
            "torch_float32": _torch_candidate(lambda weight: F.linear(x, weight), self.float32),
            "torch_bfloat16": _torch_candidate(lambda weight: F.linear(short, weight), self.bfloat16),
        }
        for kind, packed in self.ggml_packed.items():
            assert self.ggml is not None
            copies = self._count(packed.nbytes)
            product = GgmlProduct(self.ggml, packed, kind, x, self.rows, copies, threads)
            found[kind] = Candidate(product, lambda p=product: p.output(0), packed.nbytes, copies, product.close)
        return found

    def _count(self, size: int) -> int:
        return max(2, min(MOST_COPIES, -(-self.rotate_over // size)))

    def _copies(self, tensors: tuple[torch.Tensor, ...]) -> list[tuple[torch.Tensor, ...]]:
        return [tuple(in_huge_pages(t) for t in tensors) for _ in range(self._count(sum(t.nbytes for t in tensors)))]


def in_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory from numpy, which asks for huge pages from 4 MiB on; at a multiple of 64 bytes."""
    memory = torch.from_numpy(np.empty(tensor.nbytes + 64, np.uint8))
    start = -memory.data_ptr() % 64
    copy = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def _torch_candidate(function: Callable[..., torch.Tensor], copies: list[tuple[torch.Tensor, ...]]) -> Candidate:
    size = sum(tensor.nbytes for tensor in copies[0])
    return Candidate(lambda i: function(*copies[i]), lambda: function(*copies[0]), size, len(copies))


def check(candidates: Mapping[str, Candidate], x: torch.Tensor, dense: torch.Tensor) -> dict[str, float]:
    """Relative error of each candidate against float64. Raises RuntimeError for one that is wrong."""
    expected = x.double() @ dense.double().T
    errors = {}
    for name, candidate in candidates.items():
        candidate.call(0)
        errors[name] = float((candidate.output().double() - expected).norm() / expected.norm())
        if not errors[name] <= ACCEPTED[name]:
            raise RuntimeError(f"{name}: relative error {errors[name]:.2e}, accepted {ACCEPTED[name]:.2e}")
    return errors


def measure(candidates: Mapping[str, Candidate], rounds: int, burst: float) -> dict[str, list[float]]:
    """Seconds of every timed call of every candidate; `burst` seconds of calls, at least one, in each of `rounds`, up
    to MOST_SECONDS.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    following = dict.fromkeys(candidates, 0)
    names = list(candidates)
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            if turn >= LEAST_ROUNDS and sum(samples[name]) >= MOST_SECONDS:
                continue
            candidate = candidates[name]
            time.sleep(PAUSE)
            candidate.call(following[name])
            end = time.perf_counter() + burst
            while True:
                following[name] = (following[name] + 1) % candidate.copies
                begin = time.perf_counter()
                candidate.call(following[name])
                now = time.perf_counter()
                samples[name].append(now - begin)
                if now >= end:
                    break
    return samples


def limits(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the read limit for each number of threads, and of the VNNI peak where there is one."""
    size, repeats, spins = (1 << 23, 2, 1 << 10) if chosen.quick else (4 * cache_bytes("cpu"), 30, 1 << 22)
    rows = []
    for threads in chosen.threads:
        times = summary(read_limit(size, threads, repeats))
        rows.append({"kind": "read_limit", "threads": threads, "bytes": size} | times)
        print(f"read limit, {threads} threads: {size / times['min_us'] / 1e3:.1f} GB/s")
    peak = vnni_peak(spins, repeats)
    if peak is not None:
        macs, seconds = peak
        times = summary(seconds)
        rows.append({"kind": "vnni_peak", "threads": 1, "macs": macs} | times)
        print(f"VNNI peak, 1 thread: {macs / times['min_us'] / 1e3:.0f} GMAC/s")
    return rows


def embedded_shapes() -> dict[str, tuple[int, int]]:
    """The products of one layer of the embedded model, those with the same input merged."""
    if "base" not in variants():
        print("no embedded weights: their shapes are left out")
        return {}
    shapes = ModelConfig.from_json(variant_folder("base") / "config.json").linear_shapes()
    sizes = {name.split(".")[1]: shape for name, shape in shapes.items()}
    merged = {"qkv": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",), "gate_up": ("gate_proj", "up_proj")}
    return {
        f"embedded_{name}": (sum(sizes[part][0] for part in parts), sizes[parts[0]][1])
        for name, parts in (merged | {"down": ("down_proj",)}).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="time the ternary matrix product on the CPU")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--burst", type=float, default=0.05, help="seconds of calls in each round")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, to see that everything runs; no numbers to keep"
    )
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the JSON file")
    chosen = parser.parse_args()
    if chosen.quick and chosen.out == DATA:
        parser.error("--quick measures nothing worth keeping: name another folder with --out")
    ggml = find_ggml()
    print(f"ggml: {ggml.description}" if ggml else "ggml: no package that bundles it is installed, so it is left out")
    shapes = QUICK_SHAPES if chosen.quick else SHAPES | embedded_shapes()
    rotate_over = 1 << 18 if chosen.quick else 3 * cache_bytes("cpu")
    rows = limits(chosen)
    for label, (out, columns) in shapes.items():
        problem = Problem(out, columns, ggml, rotate_over)
        for tokens in QUICK_TOKENS if chosen.quick else TOKENS:
            x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
            for threads in chosen.threads if tokens <= THREADED_TOKENS else chosen.threads[:1]:
                torch.set_num_threads(threads)
                candidates = problem.candidates(x, threads)
                with torch.inference_mode():
                    errors = check(candidates, x, problem.dense)
                    samples = measure(candidates, chosen.rounds, chosen.burst)
                for name, candidate in candidates.items():
                    times = summary(samples[name])
                    rows.append(
                        {"kind": "product", "implementation": name, "shape": label, "out": out, "in": columns}
                        | {"tokens": tokens, "threads": threads, "weight_bytes": candidate.weight_bytes}
                        | {"copies": candidate.copies, "calls": len(samples[name]), "error": errors[name]}
                        | times
                    )
                    speed = f"{candidate.weight_bytes / times['min_us'] / 1e3:6.1f} GB/s"
                    speed += f" {out * columns * tokens / times['min_us'] / 1e3:6.0f} GMAC/s"
                    print(f"{label:<16} {tokens:>3} tokens {threads} threads {name:<15}", end="")
                    print(f"{times['min_us']:>10.1f} {times['median_us']:>10.1f} us {speed}", flush=True)
                    candidate.close()
    settings = {
        "rounds": chosen.rounds,
        "burst_seconds": chosen.burst,
        "threads": chosen.threads,
        "group_size": GROUP_SIZE,
        "rotate_over_bytes": rotate_over,
        "instruction_set": INSTRUCTION_SET,
        "ggml": ggml.description if ggml else None,
        "seed": 0,
    }
    print(f"wrote {write_results('ternary_matmul_cpu', 'cpu', settings, rows, chosen.out).name}")


if __name__ == "__main__":
    main()
