"""`minicpm-ref wind-tunnel coordinates | sweep | fit | predict | search`: a thin layer over this room's functions.

`sweep` trains (an hour or so in all, at any number of sittings), `fit`, `predict` and `search` read what was recorded
and take seconds. Everything heavy is imported inside the commands, so that `minicpm-ref --help` stays fast.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="Predict the large run from many small ones, and check the prediction.")
console = Console()

Data = Annotated[Path | None, typer.Option(help="Folder of the wind_tunnel_*.json. Default: figures/data.")]
Resamples = Annotated[int, typer.Option(min=2, help="Draws of the bootstrap behind every band.")]
Limit = Annotated[float, typer.Option(help="Upper limit; none by default.")]


@app.command()
def coordinates(
    widths: Annotated[str, typer.Option(help="Comma-separated widths, multiples of 16.")] = "64,128,256,512",
    steps: Annotated[int, typer.Option(min=1, help="Training steps before the sizes are compared.")] = 5,
    record: Annotated[Path | None, typer.Option(help="Folder for wind_tunnel_coordinates.json.")] = None,
) -> None:
    """Does every layer move alike at every width? Slopes of size against width, under muP and in the standard form."""
    from minicpm_ref.files import write_text
    from minicpm_ref.wind_tunnel.candidate import PARAMETRIZATIONS, Candidate
    from minicpm_ref.wind_tunnel.coordinates import coordinate_check, drifting, slopes
    from minicpm_ref.wind_tunnel.record import circumstances

    chosen = [int(width) for width in widths.split(",")]
    found: dict[str, dict[str, float]] = {}
    moved: dict[str, dict[str, float]] = {}
    sizes: list[dict[str, Any]] = []
    for form in PARAMETRIZATIONS:
        candidate = Candidate(min(chosen), min(chosen), 0, 2.0**-8, form)
        measured = coordinate_check(candidate, chosen, steps)
        found[form], moved[form] = slopes(measured), drifting(measured)
        sizes += [vars(size) for size in measured]
    table = Table("place", *PARAMETRIZATIONS, title=f"slope of log change against log width, step {steps}")
    for place in found["mup"]:
        marks = [f"{found[form][place]:+.2f}{'  drifts' if place in moved[form] else ''}" for form in found]
        table.add_row(place, *marks)
    console.print(table)
    if record is not None:
        results = circumstances() | {"settings": {"lr": 2.0**-8, "base_width": min(chosen)}, "sizes": sizes}
        write_text(record / "wind_tunnel_coordinates.json", json.dumps(results) + "\n")


@app.command()
def sweep(
    corpus: Annotated[Path, typer.Option(help="Folder written by `minicpm-ref data`.")] = Path("corpus"),
    out: Annotated[Path, typer.Option(help="Folder of the runs; finished ones are never repeated.")] = Path(
        "runs/wind_tunnel"
    ),
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time, one process each.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Threads a run.")] = 1,
    ray: Annotated[
        str | None, typer.Option(help="Run on Ray: 'local', 'auto' (a running cluster) or an address.")
    ] = None,
    first: Annotated[int | None, typer.Option(help="Only the first so many runs of the plan.")] = None,
    record: Annotated[Path | None, typer.Option(help="Then write the wind_tunnel_*.json into this folder.")] = None,
    other: Annotated[
        list[str] | None, typer.Option(help="With --record: NAME=WEIGHTS, a model of others to put on the curve.")
    ] = None,
) -> None:
    """Train the plan. Ctrl-C saves and stops; the same command goes on there."""
    from minicpm_ref.data import Corpus
    from minicpm_ref.files import write_text
    from minicpm_ref.wind_tunnel.plan import every_task
    from minicpm_ref.wind_tunnel.record import record_bench, record_law, record_rates
    from minicpm_ref.wind_tunnel.runner import run_tasks

    opened = Corpus(corpus)
    tasks = every_task(opened.manifest_sha256)[:first]
    outcomes = run_tasks(tasks, out, {"corpus": str(corpus.absolute())}, workers, threads, ray, console)
    counts = {
        status: sum(outcome.status == status for outcome in outcomes) for status in ("finished", "kept", "failed")
    }
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()))
    if record is not None:
        others = dict(pair.split("=", 1) for pair in other or ())
        for name, results in (
            ("rates", record_rates(opened, out)),
            ("law", record_law(opened, out)),
            ("bench", record_bench(out, others)),
        ):
            write_text(record / f"wind_tunnel_{name}.json", json.dumps(results) + "\n")
    if counts["failed"]:
        raise RuntimeError(
            f"{counts['failed']} run(s) failed; their logs are named above; the same command tries again"
        )


@app.command()
def fit(data: Data = None, resamples: Resamples = 50) -> None:
    """Fit the scaling law to the recorded runs."""
    from minicpm_ref.wind_tunnel.law import bootstrap_law, quantiles
    from minicpm_ref.wind_tunnel.record import recorded_law

    fitted = bootstrap_law(recorded_law(data)[0], resamples)
    table = Table("number", "fitted", "90 % band")
    for name in ("a", "alpha", "b", "beta", "floor"):
        low, high = quantiles([getattr(law, name) for law in fitted.resampled], 0.9)
        table.add_row(name, f"{getattr(fitted.law, name):.4g}", f"{low:.4g} to {high:.4g}")
    console.print(table)
    console.print(f"{fitted.failed} of {resamples} draws could not determine a law")


@app.command()
def predict(
    parameters: Annotated[float, typer.Option(help="Multiplied parameters N. Default: the embedded base's.")] = 0.0,
    tokens: Annotated[float, typer.Option(help="Training tokens D. Default: the embedded base's.")] = 0.0,
    data: Data = None,
    resamples: Resamples = 50,
) -> None:
    """Predict the held-out loss of a run, in bits per byte."""
    from minicpm_ref.wind_tunnel.law import bootstrap_law
    from minicpm_ref.wind_tunnel.record import recorded_law

    runs, base = recorded_law(data)
    n, d = parameters or base.n, tokens or base.d
    fitted = bootstrap_law(runs, resamples)
    low, high = fitted.band(n, d)
    console.print(f"N {n:.4g}, D {d:.4g}: {fitted.law.loss(n, d):.3f} bits per byte, 90 % band {low:.3f} to {high:.3f}")
    if (n, d) == (base.n, base.d):
        console.print(f"measured: {base.loss:.3f}, {100 * (fitted.law.loss(n, d) / base.loss - 1):+.1f} % off")


@app.command()
def search(
    score: Annotated[float, typer.Option(help="Target score of ScalingBench, above 0.25 (guessing).")] = 0.6,
    parameters: Limit = math.inf,
    tokens: Limit = math.inf,
    flops: Limit = math.inf,
    served_tokens: Annotated[float, typer.Option(help="Tokens the model will read and write in its life.")] = 0.0,
    data: Data = None,
    resamples: Resamples = 50,
) -> None:
    """The cheapest (N, D) for a target score; the cost is FLOPs of training and serving."""
    from minicpm_ref.wind_tunnel.record import fitted_bench
    from minicpm_ref.wind_tunnel.search import Costs, Limits, cheapest_for_score

    law, sigmoid = fitted_bench(data, resamples)
    costs = Costs(serving_flop=1.0, served_tokens=served_tokens)
    plan, bands, failed = cheapest_for_score(law, sigmoid, score, costs, Limits(parameters, tokens, flops))
    table = Table("", "cheapest", "90 % band")
    for name, word in (("n", "parameters"), ("d", "tokens"), ("cost", "FLOPs")):
        band = "{:.3g} to {:.3g}".format(*bands[name]) if bands else "none"
        table.add_row(word, f"{getattr(plan, name):.3g}", band)
    console.print(table)
    console.print(f"{failed} of {resamples} draws never reach a score of {score}")
