"""What was run for the recorded figures: every sweep as a list of tasks, in the order of their worth.

The whole plan is sized to about an hour of one CPU core (`minicpm-ref wind-tunnel sweep` says what is left of it). The
learning-rate sweep is run at four widths 8x apart in both forms, with two more seeds at the ends around the best rates;
the other knobs at the two ends under muP. The scaling runs follow the recipe of the embedded base (Muon, muP against
width 256, decay over the last fifth), at sizes and token counts that are far below a quarter of the base's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from minicpm_ref.wind_tunnel.candidate import Candidate
from minicpm_ref.wind_tunnel.tasks import Task

BASE_WIDTH = 32
WIDTHS = (32, 64, 128, 256)
RATES = {"mup": [2.0**-k for k in range(9, 2, -1)], "standard": [2.0**-k for k in range(10, 3, -1)]}
SEEDS = (0, 1, 2)
KNOBS = {
    "scale_emb": [1.5, 4.0, 12.0, 36.0, 108.0],
    "scale_depth": [0.175, 0.5, 1.4, 4.0, 11.2],
    "initializer_range": [0.0125, 0.035, 0.1, 0.28, 0.8],
}
PROXY = Candidate(width=BASE_WIDTH, base_width=BASE_WIDTH, tokens=98_304, lr=2.0**-6)

LAW_WIDTHS = (16, 32, 64, 128)
HELD_OUT_WIDTH = 256  # trained for the test of the predictions, never fitted
STABLE_STEPS = {16: [64, 128, 256, 512, 720]} | dict.fromkeys((32, 64, 128), [64, 128, 256, 512, 720])
STABLE_STEPS[HELD_OUT_WIDTH] = [64, 128, 256]
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


def train_task(name: str, candidate: Candidate, corpus_manifest_sha256: str) -> Task:
    """The task that trains `candidate`."""
    settings = candidate.settings() | {"corpus_manifest_sha256": corpus_manifest_sha256}
    return Task(name, "minicpm_ref.wind_tunnel.one_run:train_candidate", settings)


def rate_tasks(corpus: str, seeds: Sequence[int], widths: Sequence[int], rates: dict[str, list[float]]) -> list[Task]:
    """The learning-rate sweep. At the base width the two forms are one, so it is run once."""
    tasks = []
    for seed in seeds:
        for width in widths:
            for form, grid in rates.items():
                if width == BASE_WIDTH and form == "standard":
                    continue
                for lr in grid:
                    candidate = replace(PROXY, width=width, parametrization=form, lr=lr, seed=seed)
                    tasks.append(train_task(f"lr_{form}_{width}_{lr:.6f}_s{seed}", candidate, corpus))
    return tasks


def knob_tasks(corpus: str, lr: float, widths: Sequence[int] = (32, 256), seeds: Sequence[int] = (0,)) -> list[Task]:
    """One knob at a time away from its default, under muP at the rate that the first sweep found."""
    return [
        train_task(
            f"{knob}_{width}_{value:g}_s{seed}", replace(PROXY, width=width, lr=lr, seed=seed, **{knob: value}), corpus
        )
        for seed in seeds
        for knob, values in KNOBS.items()
        for width in widths
        for value in values
    ]


def branch_tasks(corpus: str, widths: Sequence[int]) -> Iterator[Task]:
    """A stable run with its decays at each width."""
    for width in widths:
        settings = replace(LAW, width=width).settings() | {
            "stable_steps": STABLE_STEPS[width],
            "corpus_manifest_sha256": corpus,
        }
        yield Task(f"law_{width}", "minicpm_ref.wind_tunnel.one_run:train_branches", settings)
