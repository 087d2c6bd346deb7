"""Ternary matrix product on a GPU: this project's kernels against torch's bfloat16 linear.

Prediction: at one token both read every weight once, 2.125 bits against 16, so at most 7.5 times as fast. A kernel in a
CUDA graph costs a microsecond or two whatever it does, and the product of a small matrix takes no longer than that:
4096 x 4096 is 4.5 MB, a microsecond of an H200's bandwidth, and stays far from 7.5. From tens of tokens on arithmetic
takes longer than reading, and packed weights can only lose.

How it is timed:
- copies of the inputs of each candidate that together exceed three times the L2 cache, each candidate its own: packed
  copies as many as dense ones would stay in the cache;
- one CUDA graph runs over all the copies, candidates take turns, median over the rounds (`common`);
- the preparation of the activations is inside the timed call, and also timed alone;
- each result is judged against float64 before anything is timed.

`ternary` is the public function. `matvec`, `matmul` and `scratch` force one of its kernels where the public function
may prefer another: by these rows MATVEC_TOKENS and SCRATCH_TOKENS of `minicpm_kernels.lowbit.ternary_triton` are to be
set. `int8`, `int8_matvec` and `int8_matmul` are the same with activations rounded to int8 (`ternary_triton_int8`), the
opponents of the float kernels; they are judged against the reference that rounds, too.

Run: python kernels/bench/ternary_matmul_gpu.py [--rounds 20] [--quick]. It needs a GPU.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import graphed, rotation, summary, time_once, write_results

from minicpm_kernels import testing
from minicpm_ref.cases import TernaryMatmulCase
from minicpm_ref.config import ModelConfig
from minicpm_ref.lowbit.packing import from_lanes, scales_from_lanes
from minicpm_ref.lowbit.ternary import dequantize, ternary_matmul, ternary_matmul_int8

SHAPES = ((4096, 4096), (16384, 4096), (4096, 16384))  # out, in
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256)
QUICK_SHAPES, QUICK_TOKENS = SHAPES[:1], (1, 16)
COPY_BYTES = 2**30
MOST_COPIES = 512  # small matrices would need more; `beyond_cache` says where this was not enough


def model_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(out, in) of the matrices of a decoder layer as they are multiplied: q, k, v and gate, up merged."""
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    return [
        (heads * config.head_dim, config.hidden_size),
        (config.hidden_size, config.num_attention_heads * config.head_dim),
        (2 * config.intermediate_size, config.hidden_size),
        (config.hidden_size, config.intermediate_size),
    ]


def candidates(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
) -> dict[str, tuple[Callable[..., torch.Tensor], tuple[Any, ...]]]:
    """Name -> (function, its arguments): y [tokens, out]."""
    from minicpm_kernels.lowbit import (
        ternary_triton as kernels,  # not above: Triton must not start on a machine without a GPU
    )
    from minicpm_kernels.lowbit import ternary_triton_int8 as int8

    subnormal = kernels._subnormal()
    words = codes.view(torch.int32).squeeze(-1)
    dense = dequantize(from_lanes(codes), scales_from_lanes(scales)).to(x.dtype)
    found: dict[str, tuple[Callable[..., torch.Tensor], tuple[Any, ...]]] = {
        "torch_bfloat16": (F.linear, (x, dense)),
        "ternary": (kernels.ternary_matmul, (x, codes, scales)),
        "matmul": (lambda *a: kernels._run_matmul(*a, subnormal), (x, words, scales)),
        "scratch": (lambda x, w, s: F.linear(x, kernels._dense(w, s, x.dtype)), (x, words, scales)),
        "int8": (int8.ternary_matmul_int8, (x, codes, scales)),
        "int8_matmul": (int8._run_matmul, (x, words, scales)),
    }
    if len(x) <= 4:
        found["matvec"] = (lambda *a: kernels._run_matvec(*a, subnormal), (x, words, scales))
        found["int8_matvec"] = (int8._run_matvec, (x, words, scales))
    return found


def prepare(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the product kernels do to the activations first."""
    from minicpm_kernels.lowbit import ternary_triton as kernels

    return kernels._prepare(x, len(x), kernels._subnormal())


def prepare_int8(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same for the kernels on int8."""
    from minicpm_kernels.lowbit import ternary_triton_int8

    return ternary_triton_int8._prepare(x, len(x))


PREPARATIONS = {"prepare": prepare, "int8_prepare": prepare_int8}  # their rows are no products


def time_in_turns(
    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]], rounds: int
) -> dict[str, dict[str, Any]]:
    """Name -> `summary` of a call, with the number of copies and whether they exceed the cache three times."""
    replays, found = {}, {}
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    for name, (function, arguments) in calls.items():
        buffers = rotation(arguments, "cuda", MOST_COPIES)
        size = sum(a.nbytes for a in arguments) * len(buffers)
        replays[name] = (graphed(function, buffers), len(buffers))
        found[name] = {"copies": len(buffers), "beyond_cache": size >= 3 * cache}
        time_once(replays[name][0], [()], "cuda")  # one pass that is thrown away
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            replay, inside = replays[name]
            samples[name].append(time_once(replay, [()], "cuda") / inside)
    return {name: found[name] | summary(seconds) for name, seconds in samples.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="time ternary products on a GPU")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="one shape, two numbers of tokens, three rounds")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(2, "no GPU here (torch.cuda.is_available() is False), and these kernels run on nothing else\n")
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.exit(2, "TRITON_INTERPRET is set, so kernels would be interpreted: unset it\n")
    rounds = 3 if chosen.quick else chosen.rounds
    shapes = QUICK_SHAPES if chosen.quick else (*SHAPES, *model_shapes(ModelConfig.preset("embedded")))
    rows: list[dict[str, Any]] = []
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda")
    copy = time_in_turns({"copy": (torch.clone, (source,))}, rounds)["copy"]
    rows.append({"implementation": "copy", "bytes": 2 * COPY_BYTES} | copy)
    del source
    for out, columns in shapes:
        for tokens in QUICK_TOKENS if chosen.quick else TOKENS:
            x, codes, scales, _ = TernaryMatmulCase("bench", (tokens,), out, columns).build(torch.bfloat16, "cuda")
            with torch.no_grad():
                calls = candidates(x, codes, scales)
                exact = ternary_matmul(x.double(), codes, scales)
                rounded = ternary_matmul_int8(x.double(), codes, scales)
                for name, (function, given) in calls.items():
                    expected = rounded if name.startswith("int8") else exact
                    testing.assert_close(function(*given), expected, what=f"{name}, {tokens} tokens, {out} x {columns}")
                times = time_in_turns(calls | {name: (call, (x,)) for name, call in PREPARATIONS.items()}, rounds)
            for name, time in times.items():
                weights = 0 if name in PREPARATIONS else given_bytes(calls[name][1])
                rows.append(product_row(name, tokens, out, columns, weights + x.nbytes, time))
                ratio = times["torch_bfloat16"]["median_us"] / time["median_us"]
                shape = f"{out:>6} x {columns:<6} {tokens:>4} {name:<14}"
                print(f"{shape} {time['median_us']:>9.2f} us {ratio:>6.2f}x bf16")
    settings = {"dtype": "bfloat16", "group_size": 128, "rounds": rounds, "quick": chosen.quick, "seed": 0}
    path = write_results("ternary_matmul_gpu_quick" if chosen.quick else "ternary_matmul_gpu", "cuda", settings, rows)
    print(f"wrote {path.name}")


def product_row(name: str, tokens: int, out: int, columns: int, read: int, time: dict[str, Any]) -> dict[str, Any]:
    """One row of the results; `read` in bytes."""
    return {"implementation": name, "tokens": tokens, "out": out, "in": columns, "bytes": read} | time


def given_bytes(arguments: tuple[torch.Tensor, ...]) -> int:
    """Bytes of the weights among a candidate's arguments, which all start with x."""
    return sum(tensor.nbytes for tensor in arguments[1:])


if __name__ == "__main__":
    main()
