"""Block-sparse attention on a CPU, both stages end to end, against dense attention of torch.

Prediction. A decode step of dense attention reads all keys and values; the sparse one the compressed keys (1/16 + 1/64
of the keys) and K blocks of 64 (published: 96). In float32 with 2 kv heads of 128 numbers that is 12.6 MB + 80 bytes a
token against 2 kB a token: equal at 6.4k tokens, 2.4 times fewer bytes at 16k, 7.5 times at 64k. A prompt of n tokens
costs 2 n^2 D H operations dense and, but for its beginning, 4 n 6144 D H + n^2 D H / 12.8 sparse: 1.5 times fewer at
16k, 2.6 times at 32k.

How it is timed:
- decoding: one token, compressed keys at hand; as many copies of the cache as make what the sparse call reads exceed
  three times the last cache of the machine, and every call takes the next one. The copies differ in nothing;
- prefill: the whole prompt, compressing the keys included. Queries are independent of each other, so that neighbours
  share no blocks but the window: the worst case for a kernel that fetches a block once for several tokens;
- the peers are scaled_dot_product_attention with enable_gqa, with keys and values repeated for every query head (a
  prompt; the repetition is not timed), and with the heads of a group as 16 queries of one head (a decode step, where
  nothing is masked). `faster_than_dense` compares medians, with the fastest of them. At the longest prompts only the
  peer that won before takes part;
- "sparse_all_blocks" is stage 2 of this kernel given every block: what is left of the ratio against it is sparsity,
  and the rest is that this kernel reads a cache better than the library (a decode step);
- all take turns, after a pause: each library's threads spin for milliseconds on the cores of the next. The first call
  of everyone is thrown away, and a median has at least three behind it, however long they take;
- floors: bytes over the read speed (decoding) or operations over the speed of a large matrix product (prefill), both
  measured in this run.

Before anything is timed, both phases are compared with the float64 reference at a short length.

Run: python kernels/bench/sparse_attention_cpu.py [--threads 2] [--lengths 8192 ...] [--quick --out FOLDER]
Writes figures/data/sparse_attention_cpu.json.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import DATA, cache_bytes, summary, write_results
from machine_limits import read_limit

from minicpm_kernels.sparse.cpu import INSTRUCTION_SET, select_blocks, sparse_attention
from minicpm_kernels.testing import assert_close, default_bound, relative_error
from minicpm_ref import sparse as reference
from minicpm_ref.config import SparseConfig

HEADS, GROUPS, WIDTH = 32, 2, 128
PUBLISHED = SparseConfig()
QUICK = SparseConfig(kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=4, dense_len=-1)
PAUSE = 0.01  # seconds; longer than the threads of an OpenMP runtime spin
LEAST_CALLS = 3  # timed, of each candidate
DENSE = ("sdpa_gqa", "sdpa_repeat", "sdpa_folded")
BOUND = default_bound(torch.float32).widened(12)  # logits up to 20, products of 128 numbers
Row = dict[str, Any]


class Sparse:
    """Both stages; notes what share of the time the first one takes."""

    def __init__(self, config: SparseConfig):
        self.config, self.first, self.whole = config, 0.0, 0.0

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, compressed: reference.CompressedKeys | None = None
    ) -> torch.Tensor:
        begin = time.perf_counter()
        blocks = select_blocks(q, k, self.config, compressed=compressed)
        middle = time.perf_counter()
        out = sparse_attention(q, k, v, blocks, self.config)
        self.first += middle - begin
        self.whole += time.perf_counter() - begin
        return out


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    """Dense, the library repeating keys and values where it must; causal for a whole prompt."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] == k.shape[2], enable_gqa=True)


def sdpa_folded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    """Dense decoding with the query heads of a group as the queries of one head."""
    folded = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    return F.scaled_dot_product_attention(folded, k, v).reshape(q.shape)


def all_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: SparseConfig) -> torch.Tensor:
    """One query a head over every block: the sparse kernel without sparsity."""
    blocks = torch.arange(-(-k.shape[2] // config.block_size), dtype=torch.int32)
    return sparse_attention(q, k, v, blocks.expand(k.shape[0], k.shape[1], q.shape[2], -1).contiguous(), config)


def draw(queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q [1, H, T, D], k, v [1, G, S, D])."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((HEADS, queries), (GROUPS, keys), (GROUPS, keys))
    q, k, v = (torch.randn(1, *size, WIDTH, generator=generator) for size in sizes)
    return q, k, v


def judge(config: SparseConfig, keys: int) -> float:
    """Largest error of both phases, relative to the RMS of the float64 reference. Raises AssertionError beyond the
    bound, when the blocks chosen are worth less than the reference's, and when a dense peer computes something else."""
    q, k, v = draw(16, keys)
    compressed, errors = reference.compress(k, config), []
    for some in (q, q[:, :, -1:]):  # queries stand at the end
        wide = [x.double() for x in (some, k, v)]
        blocks = select_blocks(some, k, config, compressed=compressed)
        lists = (blocks, reference.select_blocks(*wide[:2], config))
        scores = reference.block_scores(*wide[:2], config)
        worth, best = (scores.gather(-1, x.long().clamp(min=0)).sum(-1) for x in lists)
        torch.testing.assert_close(worth, best, rtol=1e-4, atol=0)
        actual = Sparse(config)(some, k, v, compressed)
        expected = reference.sparse_attention(*wide, blocks, config)
        assert_close(actual, expected, BOUND, "sparse attention")
        errors.append(relative_error(actual, expected)[0])
    last = q[:, :, -1:]
    wide = [x.double().repeat_interleave(HEADS // x.shape[1], 1) for x in (last, k, v)]
    exact = (wide[0] @ wide[1].mT / math.sqrt(WIDTH)).softmax(-1) @ wide[2]
    for peer in (sdpa, sdpa_folded, lambda *x: all_blocks(*x, config)):
        assert_close(peer(last, k, v), exact, BOUND, getattr(peer, "__name__", "all_blocks"))
    some = draw(64, 64)
    repeated = [x.repeat_interleave(HEADS // GROUPS, 1) for x in some[1:]]
    wide = [x.double() for x in (some[0], *repeated)]
    future = torch.ones(64, 64, dtype=torch.bool).triu(1)
    exact = (wide[0] @ wide[1].mT / math.sqrt(WIDTH)).masked_fill(future, -math.inf).softmax(-1) @ wide[2]
    assert_close(sdpa(*some), exact, BOUND, "sdpa_gqa of a prompt")
    assert_close(sdpa(some[0], *repeated), exact, BOUND, "sdpa_repeat of a prompt")
    return max(errors)


def take_turns(calls: dict[str, Callable[[int], Any]], seconds: float, most: int, burst: int) -> dict[str, list[float]]:
    """Seconds of every timed call. In each round every candidate makes an untimed call and `burst` timed ones, another
    candidate first; with bursts of one only the very first call is untimed. `seconds` is the time that each may use
    (but LEAST_CALLS are always made), `most` the largest number of calls."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    made = dict.fromkeys(calls, 0)
    names, turn = list(calls), 0

    def unfinished(name: str) -> bool:
        few = len(samples[name]) < min(LEAST_CALLS, most)
        return few or (len(samples[name]) < most and sum(samples[name]) < seconds)

    while left := [name for name in names if unfinished(name)]:
        start = turn % len(left)
        for name in left[start:] + left[:start]:
            time.sleep(PAUSE)
            untimed = turn == 0 or burst > 1
            for i in range(burst + untimed):
                begin = time.perf_counter()
                calls[name](made[name])
                made[name] += 1
                if i >= untimed:
                    samples[name].append(time.perf_counter() - begin)
        turn += 1
    return samples


def limits(threads: int, quick: bool) -> tuple[Row, float, float]:
    """(row, bytes read a second, operations a second of a matrix product), both the best of a few."""
    size, side, repeats = (1 << 23, 128, 2) if quick else (4 * cache_bytes("cpu"), 2048, 10)
    read = size / min(read_limit(size, threads, repeats))
    x, times = torch.randn(side, side), []
    for _ in range(repeats):
        begin = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - begin)
    flops = 2 * side**3 / min(times)
    print(f"limits: {read / 1e9:.1f} GB/s read, {flops / 1e9:.0f} GFLOP/s in a matrix product, {threads} threads")
    return {"kind": "limits", "read_gb_per_s": read / 1e9, "matmul_gflops": flops / 1e9}, read, flops


def visible(config: SparseConfig, tokens: int) -> tuple[float, float]:
    """(keys attended, compressed keys scored), summed over the tokens of a prompt."""
    position = torch.arange(tokens, dtype=torch.float64)
    own = position.div(config.block_size, rounding_mode="floor")
    listed = (own + 1).clamp(max=config.visible_blocks)
    keys = (listed - 1) * config.block_size + position % config.block_size + 1
    ranked = own + 1 > config.visible_blocks  # the others keep everything, and are not scored
    before = (own - config.window_blocks + (0 if config.local_inclusive else 1)).clamp(min=0)
    fine = before * (config.block_size // config.kernel_stride)
    factor = 1 if config.exact_lse else reference.COARSE_FACTOR
    coarse = (position + 1 - factor * config.kernel_size).div(factor * config.kernel_stride, rounding_mode="floor") + 1
    return float(keys.sum()), float(((fine + coarse.clamp(min=0)) * ranked).sum())


def finish(group: Row, samples: dict[str, list[float]], sparse: Sparse, floors: dict[str, float]) -> list[Row]:
    """One row an implementation: times, floor in seconds, share of it, and the ratio to the fastest dense peer."""
    times = {name: summary(seconds) for name, seconds in samples.items()}
    best = min(times[name]["median_us"] for name in DENSE if name in times)
    rows = []
    for name, measured in times.items():
        floor = floors["sparse" if name == "sparse" else "dense"]
        row = group | {"implementation": name, "calls": len(samples[name])} | measured
        row |= {"min_ms": measured["min_us"] / 1e3, "median_ms": measured["median_us"] / 1e3}
        row |= {"floor_ms": floor * 1e3, "share_of_floor": floor * 1e6 / measured["median_us"]}
        row["faster_than_dense"] = best / measured["median_us"]
        if name == "sparse":
            row["share_of_stage_1"] = sparse.first / sparse.whole
        rows.append(row)
        times_of = f"{row['median_ms']:>10.2f} ms ({row['p20_us'] / 1e3:.2f} to {row['p80_us'] / 1e3:.2f})"
        share, ratio = row["share_of_floor"], row["faster_than_dense"]
        print(f"{group['kind']:<8} {group['tokens']:>6} tokens {name:<17} {times_of} {row['calls']} calls, "
              f"{share:6.1%} of the floor {ratio:5.2f} x dense", flush=True)  # fmt: skip
    return rows


def decode(config: SparseConfig, tokens: int, options: argparse.Namespace, read: float) -> list[Row]:
    """One new token over a cache of `tokens`."""
    q, k, v = draw(1, tokens)
    compressed = reference.compress(k, config)
    listed = min(config.visible_blocks, -(-tokens // config.block_size)) * config.block_size
    pooled = sum(x.nbytes for x in compressed) if listed < tokens else 0  # nothing is scored when everything is kept
    moved = {"sparse": 2 * GROUPS * min(listed, tokens) * WIDTH * 4 + pooled, "dense": k.nbytes + v.nbytes}
    over = 1 << 20 if options.quick else 3 * cache_bytes("cpu")
    copies = [(k, v, compressed)]
    while len(copies) * moved["sparse"] < over:
        copies.append((k.clone(), v.clone(), reference.CompressedKeys(*(x.clone() for x in compressed))))
    sparse = Sparse(config)

    def calling(function: Callable[..., Any]) -> Callable[[int], Any]:
        return lambda i: function(q, *copies[i % len(copies)])

    calls = {"sparse": calling(sparse), "sdpa_gqa": calling(sdpa), "sdpa_folded": calling(sdpa_folded)}
    calls["sparse_all_blocks"] = calling(lambda q, k, v, _: all_blocks(q, k, v, config))
    samples = take_turns(calls, options.seconds / 10, options.calls, burst=3)
    group = {"kind": "decode", "tokens": tokens, "copies": len(copies), "bytes": moved}
    return finish(group, samples, sparse, {name: size / read for name, size in moved.items()})


def prefill(config: SparseConfig, tokens: int, options: argparse.Namespace, flops: float, peers: set[str]) -> list[Row]:
    """A whole prompt; `peers` are the dense implementations that take part."""
    q, k, v = draw(tokens, tokens)
    sparse = Sparse(config)
    calls: dict[str, Callable[[int], Any]] = {"sparse": lambda _: sparse(q, k, v)}
    if "sdpa_gqa" in peers:
        calls["sdpa_gqa"] = lambda _: sdpa(q, k, v)
    if "sdpa_repeat" in peers:
        repeated = [x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v)]
        calls["sdpa_repeat"] = lambda _: sdpa(q, *repeated)
    samples = take_turns(calls, options.seconds, options.calls, burst=1)
    keys, scored = visible(config, tokens)
    work = {"sparse": HEADS * WIDTH * (4 * keys + 2 * scored), "dense": HEADS * WIDTH * 2.0 * tokens * (tokens + 1)}
    group = {"kind": "prefill", "tokens": tokens, "flops": work}
    return finish(group, samples, sparse, {name: count / flops for name, count in work.items()})


def crossover(rows: list[Row], kind: str) -> Row:
    """The length from which sparse is faster for good: between the measured lengths, log of the ratio over log of the
    length. None if it is not faster at the longest, the shortest length if it is faster everywhere."""
    points = [(row["tokens"], row["faster_than_dense"]) for row in rows if row["implementation"] == "sparse"]
    points.sort()
    tokens = None
    for at, (length, ratio) in enumerate(points):
        if ratio <= 1:
            tokens = None
        elif tokens is None:
            tokens = float(length)
            if at > 0:
                before, low = points[at - 1]
                share = -math.log(low) / (math.log(ratio) - math.log(low))
                tokens = before * (length / before) ** share
    shown = "not reached" if tokens is None else f"{tokens:.0f} tokens"
    print(f"crossover in {kind}: {shown}")
    return {"kind": "crossover", "phase": kind, "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description="time block-sparse attention on the CPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    parser.add_argument("--longest-prefill", type=int, default=32768, help="longer lengths are decoded only")
    parser.add_argument("--seconds", type=float, default=15, help="of each implementation and length in prefill; a "
                        "tenth in decoding")  # fmt: skip
    parser.add_argument("--calls", type=int, default=100, help="most calls of each implementation and length")
    parser.add_argument(
        "--quick", action="store_true", help="tiny lengths, to see that everything runs; no numbers to keep"
    )
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the JSON file")
    options = parser.parse_args()
    if options.quick and options.out == DATA:
        parser.error("--quick measures nothing worth keeping: name another folder with --out")
    config = PUBLISHED
    if options.quick:
        config, options.lengths, options.seconds, options.calls = QUICK, [128, 256], 0.01, 3
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        error = judge(config, 203 if options.quick else 7011)
        print(f"largest error at the short length: {error:.1e} of the RMS")
        row, read, flops = limits(options.threads, options.quick)
        rows, found, peers = [row], {"decode": [], "prefill": []}, {"sdpa_gqa", "sdpa_repeat"}
        for tokens in sorted(options.lengths):
            found["decode"] += decode(config, tokens, options, read)
            if tokens <= options.longest_prefill:
                latest = prefill(config, tokens, options, flops, peers)
                found["prefill"] += latest
                if tokens >= 16384:  # minutes from here on
                    dense = [row for row in latest if row["implementation"] in peers]
                    peers = {min(dense, key=lambda row: row["median_us"])["implementation"]}
        for kind, measured in found.items():
            rows += [*measured, crossover(measured, kind)]
    settings = {"query_heads": HEADS, "kv_heads": GROUPS, "head_dim": WIDTH, "dtype": "float32", "seed": 0}
    settings |= {"threads": options.threads, "seconds": options.seconds, "most_calls": options.calls}
    settings |= {"rotate_over_bytes": 3 * cache_bytes("cpu"), "instruction_set": INSTRUCTION_SET}
    settings |= {"config": asdict(config), "largest_error": error}
    print(f"wrote {write_results('sparse_attention_cpu', 'cpu', settings, rows, options.out).name}")


if __name__ == "__main__":
    main()
