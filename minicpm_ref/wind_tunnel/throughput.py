"""Are two runs of one thread each faster than one run of two? `python -m minicpm_ref.wind_tunnel.throughput CORPUS`.

The same runs are made twice in one go, in turns so that a machine that slows down slows both: as many at a time as
there are cores, one thread each, and one at a time on all cores. A tiny model's products are too small to share, so the
first should win by nearly the number of cores. Meaningful on an idle machine alone; it says how busy it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from minicpm_ref.files import write_text
from minicpm_ref.wind_tunnel.plan import PROXY, train_task
from minicpm_ref.wind_tunnel.record import circumstances
from minicpm_ref.wind_tunnel.runner import run_tasks


def runs_per_hour(corpus: Path, workers: int, threads: int, runs: int, width: int) -> float:
    """Runs an hour with `workers` runs at a time of `threads` threads, starting the processes included."""
    digest = hashlib.sha256((corpus / "manifest.json").read_bytes()).hexdigest()
    tasks = [train_task(f"run_{seed}", replace(PROXY, width=width, seed=seed), digest) for seed in range(runs)]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        outcomes = run_tasks(tasks, folder, {"corpus": str(corpus)}, workers, threads, console=Console(quiet=True))
        seconds = time.monotonic() - begin
    failed = [outcome.message for outcome in outcomes if outcome.status != "finished"]
    if failed:
        raise RuntimeError(f"{len(failed)} runs did not finish: {failed[0]}")
    return runs * 3600 / seconds


def measure(corpus: Path, cores: int, rounds: int = 3, runs: int = 4, width: int = 64) -> dict[str, object]:
    """Both ways in turns, `rounds` times; the ratio is that of the medians."""
    ways: dict[str, list[float]] = {"one thread each": [], "one at a time": []}
    load = os.getloadavg()[0]
    for _ in range(rounds):
        ways["one thread each"].append(runs_per_hour(corpus, cores, 1, runs, width))
        ways["one at a time"].append(runs_per_hour(corpus, 1, cores, runs, width))
    many, one = (sorted(values)[len(values) // 2] for values in ways.values())
    settings = {"cores": cores, "rounds": rounds, "runs": runs, "width": width, "load_before": round(load, 2)}
    return circumstances() | {"settings": settings, "runs_per_hour": ways, "ratio": round(many / one, 3)}


if __name__ == "__main__":
    results = measure(Path(sys.argv[1]).absolute(), os.cpu_count() or 1)
    print(json.dumps(results, indent=1))
    if len(sys.argv) > 2:
        write_text(sys.argv[2], json.dumps(results, indent=1) + "\n")
