"""The main job: real weights, a real answer, a real text, and one table of what everything costs and buys.

`run_tour` is what `minicpm-ref tour` and `make demo` run. Speeds are medians on the machine at hand and are only
comparable with each other; bits per byte is measured on the same held-out text everywhere.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import track
from rich.table import Table
from torch import Tensor

from minicpm_ref import backend
from minicpm_ref.cache import KVCache
from minicpm_ref.checkpoint import EMBEDDED, load, variants
from minicpm_ref.config import ModelConfig
from minicpm_ref.data import read_held_out
from minicpm_ref.evaluate import bits_per_byte
from minicpm_ref.formats import has_smollm2, to_granite, to_llama
from minicpm_ref.formats.smollm2 import HOW_TO_GET
from minicpm_ref.machine import machine, read_bandwidth
from minicpm_ref.model import MiniCPM
from minicpm_ref.sampling import SamplingParams, generate
from minicpm_ref.terminal import show
from minicpm_ref.tokenizer import Tokenizer, stream_text

PREFILL, DECODE = 512, 32  # tokens of the timed prompt and of the timed continuation
QUESTION = "Why is the sky blue? Answer in two sentences."
CONTEXTS = (64, 128, 256, 512)  # lengths at which the picture shows the cost of one more token


@dataclass
class Row:
    """One line of the table; None where a number does not apply."""

    name: str
    parameters: int
    weight_bytes: int
    cache_bytes: int | None
    bits_per_byte: float | None
    prefill: float | None
    decode: float


def run_tour(console: Console, prompt: str, weights: str | None, device: str, out: Path) -> list[Row]:
    """Let a public chat model answer a question, stream a completion of `prompt`, measure every variant and decoder,
    write the picture `out`; returns the table's rows."""
    check_picture(out)
    if weights is None:
        converse(console, QUESTION, device)
    model, tokenizer = load(weights, device)
    if tokenizer is None:
        raise ValueError(f"{weights}: no tokenizer.json in the folder, so a text cannot be encoded")
    console.print(describe(model, weights, device))
    stream(console, model, tokenizer, prompt)

    documents = [document.text for document in read_held_out(EMBEDDED / "held_out.jsonl")]
    ids = torch.tensor([tokenizer.encode(max(documents, key=len))[:PREFILL]], device=device)  # [1, T]
    rows: list[Row] = []
    names = variants() if weights is None else ["base"]
    for name in track(names, "measuring", console=console, transient=True, disable=not console.is_terminal):
        if name != "base":
            model, _ = load(weights, device, variant=name)
        quality = bits_per_byte(model, tokenizer, documents)
        rows += [measure_naive(name, model, ids, quality), measure_cached(name, model, ids, quality)]
    model, _ = load(weights, device)
    if importlib.util.find_spec("transformers") is not None:
        rows.append(measure_transformers(console, model, ids))
    console.print(table(rows))
    curves = {
        "naive: recompute everything": [step_seconds(model, ids[:, :n], cached=False) for n in CONTEXTS],
        "cached: one new token": [step_seconds(model, ids[:, :n], cached=True) for n in CONTEXTS],
    }
    draw(curves, rows, machine(torch.device(device))["device"], console, out)
    console.print("Next: [bold]make lab[/bold], then open [bold]notebooks/00_start_here.ipynb[/bold].")
    return rows


def converse(console: Console, question: str, device: str, tokens: int = 96) -> None:
    """Put `question` to SmolLM2 and stream its answer, the most likely token at each step; where it is not installed,
    say how to get it."""
    if not has_smollm2():
        show(console, f"SmolLM2-135M, a public chat model, would answer a question here: {HOW_TO_GET}\n")
        return
    model, tokenizer = load("smollm2", device)
    assert tokenizer is not None
    console.print(describe(model, "SmolLM2-135M-Instruct: other people's weights in this package's decoder", device))
    console.rule("a question and its answer")
    show(console, question + "\n", style="dim")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": question}])
    answer = generate(model, torch.tensor([ids], device=model.device), tokens, None, tokenizer.eos_ids)
    for piece in stream_text(tokenizer, answer):
        show(console, piece)
    console.print()
    console.rule()


def describe(model: MiniCPM, weights: str | None, device: str) -> Panel:
    """What was loaded, in three lines."""
    c = model.config
    own = "the weights inside this package, trained by its own recipe on Python source"
    source = escape(weights) if weights else own
    lines = [
        f"[bold]{c.num_parameters():,} parameters[/bold] from {source}",
        f"{c.num_hidden_layers} layers, width {c.hidden_size}, {c.num_attention_heads} query heads on "
        f"{c.num_key_value_heads} key-value heads, vocabulary {c.vocab_size}",
        f"on {machine(torch.device(device))['device']}, {torch.get_num_threads()} threads, {model.dtype}",
    ]
    return Panel("\n".join(lines), title="minicpm_ref tour", expand=False)


def stream(console: Console, model: MiniCPM, tokenizer: Tokenizer, prompt: str, tokens: int = 120) -> None:
    """Print `prompt` and a seeded completion, token by token; of a long prompt only the end is used and shown."""
    ids = tokenizer.encode(prompt, add_bos=False)[-PREFILL:]
    console.rule("a completion: yours first, then the model's")
    show(console, tokenizer.decode(ids), style="dim")
    params = SamplingParams(temperature=0.6, top_k=40, seed=0)
    new = generate(
        model, torch.tensor([[tokenizer.bos_id, *ids]], device=model.device), tokens, params, tokenizer.eos_ids
    )
    for piece in stream_text(tokenizer, new, continues=True):
        show(console, piece)
    console.print()
    console.rule()


def clock() -> float:
    """Seconds, once everything that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(action: Callable[[], object], repeats: int = 3) -> float:
    """Median time of `action`, after one call to warm up."""
    action()
    times = []
    for _ in range(repeats):
        start = clock()
        action()
        times.append(clock() - start)
    return statistics.median(times)


def median_speeds(
    begin: Callable[[], Callable[[Tensor], Tensor]], ids: Tensor, repeats: int = 3
) -> tuple[float, float]:
    """Median tokens/s of reading `ids` [1, T] and of greedy decoding after it, after one run to warm up.

    `begin` empties the cache and returns a function from new ids to their logits.
    """
    prefill, decode = [], []
    for _ in range(repeats + 1):
        forward = begin()
        times = [clock()]
        token = forward(ids)[:, -1].argmax(-1, keepdim=True)
        times.append(clock())
        for _ in range(DECODE):
            token = forward(token)[:, -1].argmax(-1, keepdim=True)
        times.append(clock())
        prefill.append(ids.shape[1] / (times[1] - times[0]))
        decode.append(DECODE / (times[2] - times[1]))
    return statistics.median(prefill[1:]), statistics.median(decode[1:])


def nbytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers; memory that several of them share is counted once."""
    storages = [t.untyped_storage() for t in [*model.parameters(), *model.buffers()]]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@torch.no_grad()
def measure_cached(name: str, model: MiniCPM, ids: Tensor, quality: float) -> Row:
    """Prefill the prompt into a cache, then decode greedily from it."""
    cache = KVCache(model.config, 1, PREFILL + DECODE, model.device, model.dtype)

    def begin() -> Callable[[Tensor], Tensor]:
        cache.reset()
        return lambda new_ids: model(new_ids, cache)

    speeds = median_speeds(begin, ids)
    return Row(f"{name}, cached", model.config.num_parameters(), nbytes(model), cache.nbytes, quality, *speeds)


@torch.no_grad()
def measure_naive(name: str, model: MiniCPM, ids: Tensor, quality: float) -> Row:
    """Recompute the whole sequence for each token."""
    seconds = step_seconds(model, ids, cached=False)
    return Row(f"{name}, naive", model.config.num_parameters(), nbytes(model), None, quality, None, 1 / seconds)


@torch.no_grad()
def step_seconds(model: MiniCPM, ids: Tensor, cached: bool) -> float:
    """Time of producing one token after `ids` [1, T]."""
    if not cached:
        return median_seconds(lambda: model(ids))
    cache = KVCache(model.config, 1, ids.shape[1] + 1, model.device, model.dtype)
    model(ids, cache)

    def step() -> None:
        model(ids[:, -1:], cache)
        cache.truncate(cache.lengths - 1)

    return median_seconds(step, 9)


@torch.no_grad()
def measure_transformers(console: Console, model: MiniCPM, ids: Tensor) -> Row:
    """The same weights in transformers; raises RuntimeError if its logits differ by more than rounding."""
    from transformers import DynamicCache

    family, convert = ("Llama", to_llama) if model.config.is_llama else ("Granite", to_granite)
    other = convert(model)
    difference = (other(ids).logits - model(ids)).abs().max().item()
    console.print(f"transformers ({family}) on the same weights: logits differ by at most {difference:.1e}")
    if model.dtype == torch.float32 and difference > 1e-3:
        raise RuntimeError(f"transformers' logits differ by {difference:.1e}: expected less than 1e-3")

    def begin() -> Callable[[Tensor], Tensor]:
        cache = DynamicCache(config=other.config)
        return lambda new_ids: other(new_ids, past_key_values=cache, use_cache=True).logits

    speeds = median_speeds(begin, ids)
    return Row("transformers", model.config.num_parameters(), nbytes(other), None, None, *speeds)


def table(rows: list[Row]) -> Table:
    """The rows as a rich table."""
    out = Table(title=f"{PREFILL} tokens of prompt, then {DECODE} new ones; sizes in MB, speeds in tokens/s")
    for column in ("", "params", "weights", "cache", "bits/byte", "prefill", "decode"):
        out.add_column(column, justify="left" if not column else "right", no_wrap=True)

    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for row in rows:
        cache = None if row.cache_bytes is None else row.cache_bytes / 1e6
        out.add_row(
            row.name,
            f"{row.parameters / 1e6:.2f} M",
            f"{row.weight_bytes / 1e6:.1f}",
            show(cache, ".1f"),
            show(row.bits_per_byte, ".3f"),
            show(row.prefill, ",.0f"),
            show(row.decode, ",.0f"),
        )
    return out


def draw(curves: dict[str, list[float]], rows: list[Row], device: str, console: Console, out: Path) -> None:
    """Write the picture of the tour, if matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        show(console, "no picture: matplotlib is not installed (pip install 'minicpm_ref[figures]')\n")
        return
    from matplotlib.figure import Figure

    from minicpm_ref import plotting

    with plotting.styled():
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, seconds in curves.items():
            left.plot(CONTEXTS, [1e3 * s for s in seconds], marker="o", label=name)
        left.set(
            xlabel="tokens so far", ylabel="ms for one more token", title="Why there is a KV cache", ylim=(0, None)
        )
        left.legend()
        names = [row.name for row in rows][::-1]
        right.barh(names, [row.decode for row in rows][::-1])
        right.set(xlabel="tokens/s", title="Decode speed")
        figure.suptitle(f"measured on {device}", fontsize="small")
        figure.savefig(out, dpi=150)
    show(console, f"wrote {out}\n")


def check_picture(out: Path) -> None:
    """Raise, before anything is measured, FileNotFoundError or ValueError if the picture could not be written there."""
    if importlib.util.find_spec("matplotlib") is None:
        return  # there will be none
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if out.suffix.lower().removeprefix(".") not in kinds:
        raise ValueError(f"{out}: cannot write a picture of this kind; expected one of {', '.join(kinds)}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: the folder {out.parent} does not exist")
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise PermissionError(f"{out}: cannot be written")


def show_info(console: Console, config: ModelConfig, name: str, bandwidth: float | None) -> None:
    """Print the machine, what runs where and why, and the arithmetic of `config`."""
    for key, value in machine(torch.device("cpu")).items():
        show(console, f"{key:>8}: {value}\n")
    choices = Table("operation", "device", "runs on", "because", title="kernels")
    for choice in backend.describe():
        choices.add_row(*choice)
    console.print(choices)
    measured = bandwidth is None
    speed = bandwidth or read_bandwidth() / 1e9
    console.print(
        f"[bold]{escape(name)}[/bold]: {config.num_parameters():,} parameters "
        f"({config.num_parameters(embeddings=False):,} without embeddings).\n"
        f"Decoding at batch 1 reads every weight once a token, and the cache (sparse: its listed blocks), "
        f"so at {speed:.1f} GB/s "
        f"({'measured here, the best of five passes over 256 MB' if measured else 'as given'}) "
        "no program can be faster than:"
    )

    def fastest(context: int, sparse: bool) -> list[str]:
        step = [config.decode_bytes(context, bits / 8, sparse=sparse) for bits in (16, 4.25, 1.725)]
        return [f"{speed * 1e9 / moved:,.1f} tok/s" for moved in step]

    sizes = Table("context", "KV cache (16 bit)", "GFLOP/token", "16-bit weights", "4-bit", "ternary (1.73 bit)")
    contexts = sorted({min(n, config.max_position_embeddings) for n in (1024, 8192, 32768, 131072)})
    for context in contexts:
        cache = f"{context * config.kv_bytes_per_token() / 2**20:,.0f} MiB"
        flops = f"{config.flops_per_token(context) / 1e9:.2f}"
        sizes.add_row(f"{context:,}", cache, flops, *fastest(context, sparse=False))
        if config.sparse_config is not None and context >= config.sparse_config.dense_len:
            sizes.add_row("  sparse", "", "", *fastest(context, sparse=True))
    console.print(sizes)


