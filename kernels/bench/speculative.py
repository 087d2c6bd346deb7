"""Speculative decoding against plain decoding of the same executor: tokens a second, tokens a verification, and what a
verification of n tokens costs.

Prediction: a round emits tau tokens for the time of one verification of n tokens and of the draft, so the gain is
tau / (T_verify(n) + T_draft) in steps. Where a step waits for memory T_verify is nearly flat and drafts pay; the
embedded model lives in the caches and is bound by arithmetic, so there tau is the result and the gain is small.

All drafters take turns on each prompt, another one first each round, and every text is compared with the plain one: a
drafter that changes a token raises instead of getting a time. "copy" prompts end in a text that begins once more,
which is what prompt lookup is for; "code" prompts are the beginnings of held-out files.

Run: python kernels/bench/speculative.py [--executor torch|cpu] [--head FOLDER] [--rounds 5] [--smoke]. Without --head
EAGLE-3 is left out. --smoke is a tiny run that checks the program and writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from common import write_results

from minicpm_ref.checkpoint import EMBEDDED, load
from minicpm_ref.data import read_held_out, small_sample
from minicpm_ref.engine.cpu_executor import CPUExecutor
from minicpm_ref.engine.torch_executor import TorchExecutor
from minicpm_ref.model import MiniCPM
from minicpm_ref.sampling import SamplingParams
from minicpm_ref.speculative import (
    Draft,
    Drafter,
    HeadDrafter,
    ModelDrafter,
    NGramDrafter,
    Tally,
    Verifier,
    load_head,
    measure_verify,
    speculate,
)
from minicpm_ref.tokenizer import Tokenizer

SHAPES = {"chain of 2": (1, 2, 2), "chain of 4": (1, 4, 4), "tree of 8": (3, 4, 7), "tree of 32": (6, 6, 31)}
LENGTH = 512  # tokens that a row holds


class NoDrafter:
    """Plain decoding, through the same loop."""

    layers: tuple[int, ...] = ()

    def start(self, first: int) -> None:
        pass

    def extend(self, tokens: Sequence[int], features: Any) -> None:
        pass

    def propose(self, most: int) -> Draft:
        return Draft()


def executor_of(model: MiniCPM, kind: str, layers: tuple[int, ...] = ()) -> Verifier:
    """A `kind` of executor with one row."""
    if kind == "torch":
        return TorchExecutor(model, max_length=LENGTH, capture_layers=layers)
    return CPUExecutor(model, max_length=LENGTH, capture_layers=layers)


def prompts_of(tokenizer: Tokenizer, count: int, length: int) -> dict[str, list[list[int]]]:
    """Prompts of `length` tokens by kind."""
    documents = small_sample(read_held_out(EMBEDDED / "held_out.jsonl"), 400_000)
    texts = [ids for ids in (tokenizer.encode(document.text) for document in documents) if len(ids) >= length][:count]
    code = [ids[:length] for ids in texts]
    part = length * 2 // 3
    return {"code": code, "copy": [ids[:part] + ids[: length - part] for ids in texts]}


def time_text(
    executor: Verifier, drafter: Drafter, prompt: list[int], tokens: int, params: SamplingParams
) -> tuple[list[int], float, Tally]:
    """(text, seconds after the first token, tally of its rounds)."""
    tally = Tally()
    stream = speculate(executor, drafter, prompt, tokens, params, tally=tally)
    text = [next(stream)]  # the prompt is not what is compared
    begin = time.perf_counter()
    text += stream
    return text, time.perf_counter() - begin, tally


def compare(
    executor: Verifier,
    drafters: dict[str, Callable[[], Drafter]],
    prompts: list[list[int]],
    tokens: int,
    temperature: float,
    rounds: int,
) -> list[dict[str, Any]]:
    """A row a drafter: median tokens/s over rounds and prompts, and what its rounds were worth."""
    params = SamplingParams(temperature, top_p=0.9 if temperature else 1.0, seed=0)
    speeds: dict[str, list[float]] = {name: [] for name in drafters}
    tallies = {name: Tally() for name in drafters}
    names = list(drafters)
    for turn in range(rounds):
        for prompt in prompts:
            texts = {}
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                texts[name], seconds, tally = time_text(executor, drafters[name](), prompt, tokens, params)
                speeds[name].append((len(texts[name]) - 1) / seconds)
                if turn == 0:
                    add(tallies[name], tally)
            changed = [name for name in names if texts[name] != texts["none"]]
            if changed:
                raise RuntimeError(f"{changed[0]} changed the text at temperature {temperature}: not timed")
    rows = []
    for name in names:
        low, high = np.percentile(speeds[name], (20, 80)) if len(speeds[name]) > 1 else speeds[name] * 2
        rows.append(
            {
                "drafter": name,
                "temperature": temperature,
                "tokens_per_s": round(statistics.median(speeds[name]), 2),
                "p20": round(float(low), 2),
                "p80": round(float(high), 2),
                "acceptance_length": round(tallies[name].acceptance_length, 3),
                "reached": [round(rate, 3) for rate in tallies[name].rates],
                "drafted_a_round": round(tallies[name].drafted / max(1, tallies[name].rounds), 2),
            }
        )
    return rows


def add(total: Tally, part: Tally) -> None:
    """Count the rounds of `part` in `total`, too."""
    total.rounds, total.drafted, total.emitted = (
        total.rounds + part.rounds, total.drafted + part.drafted, total.emitted + part.emitted,
    )  # fmt: skip
    longest = max(len(total.reached), len(part.reached))
    counts = [reached + [0] * (longest - len(reached)) for reached in (total.reached, part.reached)]
    total.reached = [a + b for a, b in zip(*counts, strict=True)]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description="time speculative decoding")
    parser.add_argument("--executor", default="torch", choices=["torch", "cpu"])
    parser.add_argument("--variant", default="base")
    parser.add_argument("--head", default=None, help="folder of an EAGLE-3 head for this variant")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true")
    chosen = parser.parse_args(arguments)
    count, length, tokens, rounds = (1, 48, 8, 1) if chosen.smoke else (10, 128, 128, chosen.rounds)
    model, tokenizer = load(variant=chosen.variant)
    assert tokenizer is not None
    head = None if chosen.head is None else load_head(chosen.head, model)
    executor = executor_of(model, chosen.executor, () if head is None else head.layers)
    sizes = (1, 2, 4) if chosen.smoke else (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    verify = measure_verify(executor, sizes, context=length, rounds=rounds)
    rows: list[dict[str, Any]] = [
        {"drafter": "none", "kind": "verify", "tokens": size, "seconds": seconds, "steps": seconds / verify[1]}
        for size, seconds in verify.items()
    ]
    copy = executor_of(load(variant="ternary")[0], chosen.executor)
    drafters: dict[str, Callable[[], Drafter]] = {
        "none": NoDrafter,
        "ngram": lambda: NGramDrafter(stop_ids=tokenizer.eos_ids),
        "self, ternary": lambda: ModelDrafter(copy, 3),
    }
    if head is not None:
        for name, shape in SHAPES.items():
            drafters[f"eagle3, {name}"] = lambda shape=shape: HeadDrafter(head, *shape)
    for kind, prompts in prompts_of(tokenizer, count, length).items():
        for temperature in (0.0, 0.7):
            for row in compare(executor, drafters, prompts, tokens, temperature, rounds):
                rows.append({"kind": kind} | row)
                shown = f"{row['tokens_per_s']:>9.1f} tokens/s {row['acceptance_length']:>6.2f} a round"
                print(f"{kind:<5} T={temperature:<4} {row['drafter']:<20} {shown}")
    if not chosen.smoke:
        settings = {"executor": chosen.executor, "variant": chosen.variant, "prompts": count, "prompt_tokens": length,
                    "new_tokens": tokens, "rounds": rounds, "seed": 0}  # fmt: skip
        path = write_results(f"speculative_{chosen.executor}", "cpu", settings, rows)
        print(f"wrote {path.name}")
    return rows


if __name__ == "__main__":
    main()
