"""The engine against what a user would take instead: transformers on the same weights, llama.cpp on the same file.

Run it on an idle machine: `python kernels/bench/engine.py`; `--smoke` does everything once with tiny sizes and writes
nothing. `--gguf FILE` adds llama.cpp (through xllamacpp, `pip install minicpm_ref[bench]`) on that file.

What is measured, for each candidate, with the peers in turns (every round runs each candidate once and begins with
another one, so that a change of the machine's clock meets all alike) and medians over the rounds:

- *prefill*: tokens a second of a prompt of `--prompts` tokens, up to its first new token;
- *decode*: tokens a second after that token, at the context that the prompt makes;
- *streams*: total tokens a second of eight requests at once, over one (ours only: the peers' loops here have one row).

Before a candidate is timed its greedy tokens are compared with the reference decoder's: a fast wrong engine is no
result. Differences are recorded as the length of the common beginning; llama.cpp reads other weights and is not judged.

Left out: energy, and the first call, which compiles (its seconds are printed and recorded apart).
"""

from __future__ import annotations

import argparse
import importlib
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import DATA, summary, write_results

from minicpm_ref.checkpoint import load
from minicpm_ref.engine import Engine
from minicpm_ref.formats.granite import to_granite
from minicpm_ref.model import MiniCPM
from minicpm_ref.sampling import SamplingParams, generate

Timing = tuple[float, float, list[int]]  # seconds to the first token, seconds for the others, the tokens


@dataclass
class Candidate:
    """Something that continues a prompt greedily for exactly n tokens; `judged`: on the weights of the reference."""

    name: str
    run: Callable[[Sequence[int], int], Timing]
    judged: bool = True


def engine_run(engine: Engine) -> Callable[[Sequence[int], int], Timing]:
    """Times one request of an engine; the end token is banned, so that every answer has the same length."""

    def run(prompt: Sequence[int], tokens: int) -> Timing:
        result = finished(engine, [prompt], tokens)[0]
        counts = result.statistics
        return counts.prefill_seconds, counts.decode_seconds, result.tokens

    return run


def finished(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> list[Any]:
    """The results of several requests at once, computed from scratch (no prefix is reused)."""
    params = SamplingParams(logit_bias=dict.fromkeys(engine.tokenizer.eos_ids, -100.0))
    engine.forget()
    waiting = [engine.submit(engine.request(list(prompt), tokens, params)) for prompt in prompts]
    for stream in waiting:
        for _ in stream:
            pass
    return [stream.result for stream in waiting]


def transformers_run(model: MiniCPM) -> Callable[[Sequence[int], int], Timing]:
    """transformers' decoder with its own cache, in the loop that its `generate` runs without the sampling code."""
    peer = to_granite(model).eval()

    @torch.no_grad()
    def run(prompt: Sequence[int], tokens: int) -> Timing:
        start = time.perf_counter()
        out = peer(torch.tensor([list(prompt)]), use_cache=True, logits_to_keep=1)
        found = [int(out.logits[0, -1].argmax())]
        first = time.perf_counter()
        for _ in range(tokens - 1):
            out = peer(torch.tensor([found[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            found.append(int(out.logits[0, -1].argmax()))
        return first - start, time.perf_counter() - first, found

    return run


def llama_cpp_run(path: Path, max_length: int, threads: int) -> Callable[[Sequence[int], int], Timing]:
    """llama.cpp on a GGUF file, by its own clock."""
    xllamacpp = importlib.import_module("xllamacpp")  # of the extra `bench`, which only this line needs

    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = max_length, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.cache_prompt, settings.cache_ram_mib, settings.warmup = False, 0, True
    server = xllamacpp.Server(settings)

    def run(prompt: Sequence[int], tokens: int) -> Timing:
        asked = {"prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": False}
        answer = server.handle_completions(asked | {"cache_prompt": False, "samplers": ["top_k"], "top_k": 1})
        if "timings" not in answer:
            raise RuntimeError(f"llama.cpp on {path.name} gave no timings: {str(answer)[:200]}")
        timings = answer["timings"]
        return timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3, []

    return run


def agreement(model: MiniCPM, candidate: Candidate, prompt: Sequence[int], tokens: int) -> int:
    """How many of the first greedy tokens are the reference decoder's."""
    expected = list(generate(model, torch.tensor([list(prompt)]), tokens))
    _, _, found = candidate.run(prompt, tokens)
    return next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), tokens)


def measure(candidates: Sequence[Candidate], prompt: Sequence[int], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """One row a candidate: tokens a second of prefill and decode, medians over interleaved rounds."""
    times: dict[str, list[Timing]] = {candidate.name: [] for candidate in candidates}
    for number in range(rounds + 1):  # the first one warms up
        turn = number % len(candidates)
        for candidate in [*candidates[turn:], *candidates[:turn]]:
            timing = candidate.run(prompt, tokens)
            if number:
                times[candidate.name].append(timing)
    rows = []
    for name, found in times.items():
        first, others = [t[0] for t in found], [t[1] for t in found]
        rows.append(
            {
                "candidate": name,
                "prompt": len(prompt),
                "tokens": tokens,
                "prefill_tokens_per_second": len(prompt) / statistics.median(first),
                "decode_tokens_per_second": (tokens - 1) / statistics.median(others),
                "prefill": summary(first),
                "decode": summary(others),
            }
        )
    return rows


def streams(engine: Engine, name: str, prompt: Sequence[int], tokens: int, rounds: int) -> dict[str, Any]:
    """Total tokens a second of one and of `batch` requests at once, in turns."""
    count = engine.executor.batch
    seconds: dict[int, list[float]] = {1: [], count: []}
    for number in range(rounds + 1):
        for several in (1, count):
            prompts = [[*prompt[:-1], 300 + i] for i in range(several)]
            start = time.perf_counter()
            finished(engine, prompts, tokens)
            if number:
                seconds[several].append(time.perf_counter() - start)
    one, all_of_them = (statistics.median(seconds[several]) for several in (1, count))
    return {
        "candidate": name,
        "streams": count,
        "one_tokens_per_second": tokens / one,
        "total_tokens_per_second": count * tokens / all_of_them,
    }


def main() -> None:
    """Measure, print a table, and write figures/data/engine_cpu.json."""
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--smoke", action="store_true", help="tiny sizes, one round, nothing is written")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--prompts", type=int, nargs="+", default=[128, 1024])
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--gguf", type=Path, nargs="*", default=[], help="files for llama.cpp")
    options.add_argument("--executors", nargs="+", default=["torch", "compiled"])
    options.add_argument("--out", type=Path, default=DATA)
    chosen = options.parse_args()
    if chosen.smoke:
        chosen.rounds, chosen.prompts, chosen.tokens = 1, [8], 4
    model, tokenizer = load()
    max_length = max(chosen.prompts) + chosen.tokens
    threads = torch.get_num_threads()
    engines, candidates, rows = [], [], []
    for executor in chosen.executors:
        start = time.perf_counter()
        engine = Engine(model, tokenizer, executor=executor, weights="float32", max_length=max_length, batch=8)
        name = f"minicpm_ref {executor} float32"
        engine_run(engine)([1, 2, 3], 2)
        rows.append({"candidate": name, "ready_seconds": time.perf_counter() - start})
        engines.append((engine, name))
        candidates.append(Candidate(name, engine_run(engine)))
    candidates.append(Candidate("transformers float32", transformers_run(model)))
    for path in chosen.gguf:
        run = llama_cpp_run(path, max_length, threads)
        candidates.append(Candidate(f"llama.cpp {path.stem}", run, judged=False))
    numbers = random.Random(0)
    for length in chosen.prompts:
        prompt = [numbers.randrange(300, model.config.vocab_size) for _ in range(length)]
        for candidate in candidates:
            if candidate.judged:
                agreed = agreement(model, candidate, prompt, chosen.tokens)
                rows.append({"candidate": candidate.name, "prompt": length, "greedy_tokens_agreed": agreed})
        rows += measure(candidates, prompt, chosen.tokens, chosen.rounds)
    for engine, name in engines:
        rows.append(streams(engine, name, prompt[: chosen.prompts[0]], chosen.tokens, chosen.rounds))
    for row in rows:
        print({key: value for key, value in row.items() if key not in ("prefill", "decode")})
    settings = {"rounds": chosen.rounds, "tokens": chosen.tokens, "threads": threads, "model": "embedded base"}
    if not chosen.smoke:
        print(write_results("engine_cpu", "cpu", settings, rows, chosen.out))


if __name__ == "__main__":
    main()
