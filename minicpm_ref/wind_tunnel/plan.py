"""What is run for the recorded figures: every sweep as a list of tasks, in the order of their worth.

The order matters because a sweep is cut off when time is up and what is finished then is what there is: first what the
claims rest on, then more seeds, then more widths and knobs. `figures/data/wind_tunnel_rates.json` says how far it went.

* Rates: widths 16 to 128, 8x apart, under muP and in the standard form; base width 32, where the two are one model.
  The grids are in steps of 2 around each optimum, wide enough that it lies inside.
* Law: one stable run a width with three decays, by the recipe of the embedded base (Muon, muP against width 256), at
  sizes and token counts that are below a quarter of the base's.
* Knobs: the other muP settings, one at a time away from their defaults.

Budget: about 20 minutes of one core for rates and law, as much again for the second seeds, width 256 and the knobs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from minicpm_ref.wind_tunnel.candidate import Candidate
from minicpm_ref.wind_tunnel.tasks import Task

BASE_WIDTH = 32
PROXY = Candidate(width=BASE_WIDTH, base_width=BASE_WIDTH, tokens=98_304, lr=2.0**-6)
KNOBS = {
    "scale_emb": [1.5, 4.0, 12.0, 36.0, 108.0],
    "scale_depth": [0.175, 0.5, 1.4, 4.0, 11.2],
    "initializer_range": [0.0125, 0.035, 0.1, 0.28, 0.8],
}

LAW_WIDTHS = (16, 32, 64, 128)
STABLE_STEPS = (64, 160, 400)  # a decay from each of them; with `decay` 0.2 the runs have 80, 200 and 500 steps
LAW = Candidate(
    width=16,
    base_width=256,
    tokens=0,  # the branches say
    lr=0.01,
    ffn_ratio=3,
    optimizer="muon",
    matrix_lr=0.02,
    weight_decay=0.05,
    warmup_tokens=32_768,
    decay=0.2,
    context=256,
    batch_tokens=2048,
    evaluation_bytes=100_000,
)


def powers(first: int, last: int) -> list[float]:
    """2^-first, ..., 2^-last: rates in steps of 2."""
    return [2.0**-k for k in range(first, last - 1, -1)]


def every_task(corpus: str) -> list[Task]:
    """The whole plan for the corpus whose manifest has the SHA-256 `corpus`; the most valuable runs come first."""
    return [
        *rate_tasks(corpus, [0], [BASE_WIDTH], {"mup": powers(9, 3)}),
        *rate_tasks(corpus, [0], [128], {"mup": powers(8, 5), "standard": powers(10, 6)}),
        *branch_tasks(corpus, LAW_WIDTHS),
        *rate_tasks(corpus, [0], [16], {"mup": powers(8, 4), "standard": powers(8, 4)}),
        *rate_tasks(corpus, [1, 2], [16], {"mup": powers(8, 5), "standard": powers(7, 4)}),
        *rate_tasks(corpus, [1, 2], [128], {"mup": powers(8, 5), "standard": powers(10, 7)}),
        *rate_tasks(corpus, [1, 2], [BASE_WIDTH], {"mup": powers(8, 5)}),
        *rate_tasks(corpus, [0], [64], {"mup": powers(8, 5), "standard": powers(9, 6)}),
        *rate_tasks(corpus, [0], [256], {"mup": powers(8, 5), "standard": powers(11, 8)}),
        *knob_tasks(corpus, PROXY.lr),
    ]


def train_task(name: str, candidate: Candidate, corpus: str) -> Task:
    """The task that trains `candidate`."""
    settings = candidate.settings() | {"corpus_manifest_sha256": corpus}
    return Task(name, "minicpm_ref.wind_tunnel.one_run:train_candidate", settings)


def rate_tasks(
    corpus: str, seeds: Sequence[int], widths: Sequence[int], rates: Mapping[str, Sequence[float]]
) -> list[Task]:
    """A learning-rate sweep: `rates` lists them for each form. At the base width the two forms are one model."""
    return [
        train_task(
            f"lr_{form}_{width}_{lr:.6f}_s{seed}",
            replace(PROXY, width=width, parametrization=form, lr=lr, seed=seed),
            corpus,
        )
        for seed in seeds
        for width in widths
        for form, grid in rates.items()
        for lr in grid
    ]


def knob_tasks(corpus: str, lr: float, widths: Sequence[int] = (16, 128), seeds: Sequence[int] = (0,)) -> list[Task]:
    """One knob at a time away from its default, under muP at the rate that the first sweep found."""
    tasks = []
    for seed in seeds:
        for knob, values in KNOBS.items():
            for width in widths:
                for value in values:
                    changes: dict[str, Any] = {"width": width, "lr": lr, "seed": seed, knob: value}
                    tasks.append(train_task(f"{knob}_{width}_{value:g}_s{seed}", replace(PROXY, **changes), corpus))
    return tasks


def branch_tasks(corpus: str, widths: Sequence[int], stable_steps: Sequence[int] = STABLE_STEPS) -> Iterator[Task]:
    """A stable run with its decays at each width."""
    for width in widths:
        settings = replace(LAW, width=width).settings() | {
            "stable_steps": list(stable_steps),
            "corpus_manifest_sha256": corpus,
        }
        yield Task(f"law_{width}", "minicpm_ref.wind_tunnel.one_run:train_branches", settings)
