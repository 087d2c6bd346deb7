"""Block-sparse attention on a GPU: both stages, forward, backward and decoding, against dense and sparse peers.

Prediction, before any timing. Dense causal attention of n tokens is 2 n^2 D H FLOPs, the selected blocks are
4 n K 64 D H, and scoring adds 2.5 n^2 D H / 32. At 128k tokens and K = 96 the ratio is 7.7: the most that an equally
efficient kernel can win. Decoding is bound by bytes: dense reads all keys and values, sparse the compressed keys and
96 blocks, 11.6 times fewer at 128k; there launches weigh more than bytes, so it is timed inside a CUDA graph.

Each row has the median time with its spread, useful TFLOP/s (the waste of a union is not counted), the floor (the
larger of FLOPs over the matmul speed and bytes over the copy speed, both measured in this run), the share of the floor
reached, the valid blocks and the overlap of its lists (`sparse_lists`), the error, and the ratio to every peer of its
group. Errors are judged first, against the float64 reference on the last tokens: a wrong kernel raises and prints no
time. A peer that refuses a shape gets a row that says so.

Peers in the same run: SDPA flash and SDPA cuDNN (dense), FlexAttention with the same lists, the one-token design (the
published NSA and InfLLM-V2 kernels work this way), torch.topk with sort for the selection.

Run: python kernels/bench/sparse_attention.py [--quick] [--rounds 10] [--lengths 8192 ...]. Needs a CUDA GPU.
Writes figures/data/sparse_attention.json (sparse_attention_quick.json with --quick).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from common import graphed, rotation, summary, time_once, write_results
from sparse_lists import KINDS, draw_inputs, draw_lists, overlap, valid_blocks
from torch.nn.attention import SDPBackend, sdpa_kernel

from minicpm_kernels.sparse import one_token
from minicpm_kernels.sparse.arguments import placement
from minicpm_kernels.sparse.attention import sparse_attention
from minicpm_kernels.sparse.blocks import compress_keys, select_blocks
from minicpm_kernels.testing import assert_close, default_bound, relative_error
from minicpm_ref import sparse as reference
from minicpm_ref.config import SparseConfig

HEADS, GROUPS, WIDTH, DTYPE = 32, 2, 128, torch.bfloat16
CONFIGS = {
    96: SparseConfig(),  # as published
    64: SparseConfig(topk=32),  # 1 first + 33 local + 30 chosen
    16: SparseConfig(topk=8, window_size=512),  # 1 first + 9 local + 6 chosen
}
JUDGED = 64  # tokens compared with the reference
Row = dict[str, Any]


def sdpa(backend: SDPBackend, causal: bool) -> Callable[..., torch.Tensor]:
    """Dense attention by one named library kernel."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return attend


DENSE = {"sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION}


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor) -> Callable[[], torch.Tensor]:
    """FlexAttention with the same list for every token: a table of bits, and the union over 128 tokens to skip by."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    batch, groups, tokens, _ = blocks.shape
    count, heads = tokens // 64, q.shape[1]
    table = torch.zeros(batch, groups, tokens, count + 1, dtype=torch.bool, device=q.device)
    table.scatter_(-1, torch.where(blocks < 0, count, blocks).long(), True)
    union = table[..., :count].view(batch, groups, tokens // 128, 128, count).any(3)
    union = union.repeat_interleave(heads // groups, 1)  # [B, H, T / 128, N]

    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        return table[b, h // (heads // groups), i, j // 64] & (j <= i)

    order = union.to(torch.int8).argsort(-1, descending=True, stable=True).to(torch.int32)
    mask = BlockMask.from_kv_blocks(union.sum(-1).to(torch.int32), order, BLOCK_SIZE=(128, 64), mask_mod=visible)
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Row]:
    """name -> `summary`, every round timing every call and starting with another; or name -> why it was refused."""
    found: dict[str, Row] = {}
    for name, call in calls.items():
        try:
            call()
        except (RuntimeError, NotImplementedError) as error:
            if name not in {*DENSE, "flex"}:
                raise  # only a peer may be left out
            found[name] = {"refused": str(error).splitlines()[0][:200]}
    ready = [name for name in calls if name not in found]
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(rounds):
        start = turn % max(len(ready), 1)
        for name in ready[start:] + ready[:start]:
            samples[name].append(time_once(calls[name], [()], "cuda"))
    return found | {name: summary(seconds) for name, seconds in samples.items()}


def calibrate(rounds: int) -> tuple[Row, float, float]:
    """(row, FLOP/s of an 8192^3 matmul, bytes/s of a 1 GiB copy), measured now: the floors use these."""
    x = torch.randn(8192, 8192, device="cuda", dtype=DTYPE)
    y = torch.ones(2**28, device="cuda", dtype=torch.float32)
    times = interleaved({"matmul": lambda: x @ x, "copy": y.clone}, rounds)
    flops = 2 * 8192**3 / (times["matmul"]["median_us"] * 1e-6)
    speed = 2 * y.nbytes / (times["copy"]["median_us"] * 1e-6)
    return {"function": "calibration", "matmul_tflops": flops / 1e12, "copy_gb_per_s": speed / 1e9}, flops, speed


def finish(
    group: Row, times: dict[str, Row], flops: dict[str, float], moved: dict[str, float], limits: Any
) -> list[Row]:
    """One row an implementation: its time, its floor, and its ratio to everybody in the group."""
    rows = []
    for name, time in times.items():
        row = group | {"implementation": name} | time
        if "median_us" in time:
            seconds = time["median_us"] * 1e-6
            by_flops, by_bytes = flops[name] / limits[0], moved[name] / limits[1]
            floor = max(by_flops, by_bytes)
            row |= {
                "ms": seconds * 1e3,
                "useful_tflops": flops[name] / seconds / 1e12,
                "gb_per_s": moved[name] / seconds / 1e9,
                "floor_ms": floor * 1e3,
                "share_of_floor": floor / seconds,
                "bound": "flops" if by_flops > by_bytes else "bytes",
                "faster_than": {n: t["median_us"] / time["median_us"] for n, t in times.items() if "median_us" in t},
            }
        rows.append(row)
        shown = f"{row['ms']:9.3f} ms {row['share_of_floor']:6.1%} of the floor" if "ms" in row else row["refused"]
        print(f"{group['function']:<10} {group['tokens']:>7} x {group['batch']} {group.get('blocks', ''):>3} "
              f"{group.get('lists', ''):<9} {name:<12} {shown}", flush=True)  # fmt: skip
    return rows


def judge(attend: Callable[..., torch.Tensor], arguments: tuple[Any, ...], config: SparseConfig) -> float:
    """RMS error of the last tokens relative to the float64 reference; raises AssertionError beyond the bound."""
    q, k, v, blocks = arguments
    last = slice(q.shape[2] - JUDGED, None)
    wide = [x.double() for x in (q[:, :, last], k, v)]
    expected = reference.sparse_attention(*wide, blocks[:, :, last].contiguous(), config)
    actual = attend(q, k, v, blocks)[:, :, last]
    assert_close(actual, expected, default_bound(DTYPE).widened(2), "sparse attention")
    return relative_error(actual, expected)[1]


def prompt_rows(tokens: int, batch: int, count: int, kind: str, options: Any, limits: Any) -> list[Row]:
    """Selection, forward, forward and backward, and both stages, for one shape and one kind of lists."""
    config = CONFIGS[count]
    q, k, v = draw_inputs(kind, batch, tokens, HEADS, GROUPS, WIDTH, DTYPE, "cuda", options.seed)
    blocks = draw_lists(kind, q, k, config, options.seed)
    where = placement("bench", q, k, None, None)

    def union(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        return sparse_attention(q, k, v, blocks, config)

    def token(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        return one_token.attend_tokens(q, k, v, blocks, *where, config.block_size, part=None)[0]

    valid = valid_blocks(blocks)
    group = {"tokens": tokens, "batch": batch, "blocks": count, "lists": kind}
    group |= {"valid_blocks": valid, "overlap": overlap(q, k, blocks, config)}
    group |= {"error": judge(union, (q, k, v, blocks), config), "token_error": judge(token, (q, k, v, blocks), config)}
    dense_flops = 2.0 * batch * HEADS * WIDTH * tokens**2
    sparse_flops = 4.0 * batch * HEADS * WIDTH * tokens * valid * config.block_size
    score_flops = 2.0 * batch * HEADS * WIDTH * tokens**2 / 2 * (1 / 16 + 1 / 64)
    once = float(2 * q.nbytes + k.nbytes + v.nbytes)

    calls: dict[str, Callable[[], Any]] = {"union": lambda: union(q, k, v, blocks)}
    calls["token"] = lambda: token(q, k, v, blocks)
    dense = {name: sdpa(backend, True) for name, backend in DENSE.items()}
    calls |= {name: lambda f=f: f(q, k, v) for name, f in dense.items()}
    if options.flex and tokens <= options.flex_tokens:
        calls["flex"] = flex(q, k, v, blocks)
    flops = dict.fromkeys(calls, sparse_flops) | dict.fromkeys(DENSE, dense_flops)
    rows = finish(
        group | {"function": "forward"}, interleaved(calls, options.rounds), flops, dict.fromkeys(calls, once), limits
    )

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)
    train: dict[str, Callable[[], Any]] = {
        "union": lambda: torch.autograd.grad(union(*leaves, blocks), leaves, dout),
        **{name: lambda f=f: torch.autograd.grad(f(*leaves), leaves, dout) for name, f in dense.items()},
    }
    flops = {name: 3.5 * value for name, value in flops.items()}
    times = interleaved(train, options.rounds)
    rows += finish(group | {"function": "forward+backward"}, times, flops, dict.fromkeys(train, 4 * once), limits)
    if kind not in ("selected", "same"):
        return rows

    calls = {"union": lambda: union(q, k, v, select_blocks(q, k, config))}
    calls |= {name: lambda f=f: f(q, k, v) for name, f in dense.items()}
    flops = dict.fromkeys(calls, dense_flops) | {"union": sparse_flops + score_flops}
    times = interleaved(calls, options.rounds)
    rows += finish(group | {"function": "end to end"}, times, flops, dict.fromkeys(calls, once), limits)

    scores = torch.rand(batch, GROUPS, min(tokens, 8192), tokens // config.block_size, device="cuda")
    pieces = tokens // scores.shape[2]

    def library() -> None:
        """Only the top-k, of scores that are there already."""
        for _ in range(pieces):
            scores.topk(min(config.visible_blocks, scores.shape[3])).indices.sort(-1)

    times = interleaved({"select": lambda: select_blocks(q, k, config), "torch.topk+sort": library}, options.rounds)
    moved = {"select": float(q.nbytes + k.nbytes + blocks.nbytes), "torch.topk+sort": float(scores.nbytes * pieces)}
    return rows + finish(
        group | {"function": "selection"}, times, {"select": score_flops, "torch.topk+sort": 0.0}, moved, limits
    )


def decode_rows(tokens: int, batch: int, options: Any, limits: Any) -> list[Row]:
    """One new token over a cache of `tokens`: both stages in a CUDA graph, over buffers that exceed the cache."""
    config = CONFIGS[96]
    q, k, v = draw_inputs("random", batch, tokens, HEADS, GROUPS, WIDTH, DTYPE, "cuda", options.seed)
    q = q[:, :, -1:].contiguous()
    size, stride = config.kernel_size, config.kernel_stride
    fine, coarse = compress_keys(k, size, stride), compress_keys(k, 4 * size, 4 * stride)

    def sparse(q: Any, k: Any, v: Any, fine: Any, coarse: Any) -> torch.Tensor:
        return sparse_attention(q, k, v, select_blocks(q, k, config, compressed=(fine, coarse)), config)

    arguments = (q, k, v, fine, coarse)
    expected = reference.sparse_attention(*(x.double() for x in (q, k, v)), select_blocks(q, k, config), config)
    actual = sparse(*arguments)
    assert_close(actual, expected, default_bound(DTYPE).widened(2), "decoding")
    group = {"function": "decode", "tokens": tokens, "batch": batch, "blocks": 96}
    group |= {"error": relative_error(actual, expected)[1]}
    buffers = rotation(arguments, "cuda", at_most=16)
    functions: dict[str, Callable[..., Any]] = {"sparse": sparse}
    dense = {name: sdpa(backend, False) for name, backend in DENSE.items()}
    functions |= {name: lambda *a, f=f: f(*a[:3]) for name, f in dense.items()}
    times, calls = {}, {}
    for name, function in functions.items():
        try:
            calls[name] = graphed(function, buffers)
        except RuntimeError as error:
            if name == "sparse":
                raise
            times[name] = {"refused": str(error).splitlines()[0][:200]}
    samples = interleaved(calls, max(options.rounds, 20))
    times |= {name: {key: value / len(buffers) for key, value in found.items()} for name, found in samples.items()}
    listed = 2.0 * batch * GROUPS * min(96 * 64, tokens) * WIDTH * 2
    moved = dict.fromkeys(functions, float(k.nbytes + v.nbytes)) | {"sparse": listed + fine.nbytes + coarse.nbytes}
    flops = {name: value * HEADS / GROUPS for name, value in moved.items()}  # 2 FLOPs a 2-byte number and head
    return finish(group, times, flops, moved, limits)


def main() -> None:
    parser = argparse.ArgumentParser(description="time block-sparse attention")
    parser.add_argument("--quick", action="store_true", help="one short shape of everything")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--blocks", type=int, nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--lists", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--no-flex", dest="flex", action="store_false", help="leave FlexAttention out, slow to compile")
    parser.add_argument("--flex-tokens", type=int, default=32768, help="longest prompt that FlexAttention is given")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "kernels/bench/sparse_attention.py needs a CUDA GPU: torch.cuda.is_available() is False. Without one, "
            "`make test-code` runs the same kernels in Triton's interpreter and `make test-aot` compiles them."
        )
    lengths, batches, counts, kinds = options.lengths, options.batches, options.blocks, options.lists
    if options.quick:
        lengths, batches, counts, kinds, options.rounds = [8192], [1], [96], ["public", "selected"], 3
    row, *limits = calibrate(options.rounds)
    rows = [row]
    for tokens in lengths:
        for batch in batches:
            for count in counts:
                for kind in kinds:
                    rows += prompt_rows(tokens, batch, count, kind, options, limits)
                    torch.cuda.empty_cache()
        for batch in (1,) if options.quick else (1, 8):
            rows += decode_rows(tokens, batch, options, limits)
    settings = {"query_heads": HEADS, "kv_heads": GROUPS, "head_dim": WIDTH, "dtype": "bfloat16"}
    settings |= {"rounds": options.rounds, "seed": options.seed}
    settings |= {"configs": {str(count): asdict(config) for count, config in CONFIGS.items()}}
    name = "sparse_attention_quick" if options.quick else "sparse_attention"
    print(f"wrote {write_results(name, 'cuda', settings, rows).name}")


if __name__ == "__main__":
    main()
