"""The charts of the wind tunnel: coordinates, rates, the law and the score. Each takes results, returns a figure."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from minicpm_ref.plotting import COLOURS, source_note
from minicpm_ref.wind_tunnel import Run, Scored, bootstrap_law, bootstrap_sigmoid
from minicpm_ref.wind_tunnel.scaling_bench import GUESSING

FORMS = {"mup": "muP", "standard": "standard form"}


def coordinates(results: dict[str, Any]) -> Figure:
    """How much every place changed after a few steps, against the width: flat under muP, drifting without."""
    fig, axes = plt.subplots(1, 2, sharey=True)
    last = max(row["step"] for row in results["sizes"])
    for ax, form in zip(axes, FORMS, strict=True):
        rows = [row for row in results["sizes"] if row["form"] == form and row["step"] == last]
        for place in dict.fromkeys(row["place"] for row in rows):
            points = sorted((row["width"], row["change"]) for row in rows if row["place"] == place)
            ax.loglog(*zip(*points, strict=True), "o-", markersize=4, label=place)
        widths = sorted({row["width"] for row in rows})
        ax.set_xticks(widths, widths)
        ax.minorticks_off()
        ax.set(title=FORMS[form], xlabel="width")
    axes[0].set_ylabel(f"mean |change| after step {last}")
    axes[1].legend(fontsize=7)
    fig.supxlabel(source_note(results), fontsize=7)
    return fig


def rates(results: dict[str, Any]) -> Figure:
    """Held-out loss against the learning rate at every width; a ring marks each width's best rate."""
    fig, axes = plt.subplots(1, 2, sharey=True)
    usual = [run for run in results["runs"] if is_default(run)]
    widths = sorted({run["width"] for run in usual})
    colours = dict(zip(widths, list(COLOURS.values()), strict=False))
    base = results["settings"]["base_width"]
    for ax, form in zip(axes, FORMS, strict=True):
        for width in widths:
            # at the base width the two forms are one model, which is run once
            same = [r for r in usual if r["width"] == width and (r["parametrization"] == form or width == base)]
            points = mean_by_rate(same)
            if len(points) < 3:  # not yet a valley
                continue
            ax.plot(*zip(*points, strict=True), "o-", markersize=3, color=colours[width], label=f"width {width}")
            best = min(points, key=lambda point: point[1])
            ax.plot(*best, "o", markersize=10, markerfacecolor="none", color=colours[width])
        ax.set_xscale("log", base=2)
        ax.set(title=FORMS[form], xlabel="learning rate")
    axes[0].set_ylabel("held-out bits per byte")
    axes[0].legend(fontsize=7)
    fig.supxlabel(source_note(results), fontsize=7)
    return fig


def is_default(run: dict[str, Any]) -> bool:
    """A run of the rate sweep: all knobs at their defaults."""
    return (run["scale_emb"], run["scale_depth"], run["initializer_range"]) == (12.0, 1.4, 0.1)


def mean_by_rate(runs: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(rate, held-out loss averaged over the seeds), in the order of the rates."""
    found: dict[float, list[float]] = {}
    for run in runs:
        found.setdefault(run["lr"], []).append(run["held_out_bits_per_byte"])
    return [(rate, float(np.mean(values))) for rate, values in sorted(found.items())]


def law(results: dict[str, Any]) -> Figure:
    """The fitted law through the ends of the decays, and what it says of the base before and after looking."""
    runs = [Run(run["n"], run["d"], run["loss"]) for run in results["runs"]]
    base = results["base"]
    fitted = bootstrap_law(runs, 30)
    fig, ax = plt.subplots()
    tokens = np.geomspace(min(run.d for run in runs), base["d"], 60)
    for n, colour in zip(sorted({run.n for run in runs}) + [base["n"]], list(COLOURS.values()), strict=False):
        ax.plot(tokens, [fitted.law.loss(n, d) for d in tokens], color=colour, linewidth=1, label=f"N = {n:,.0f}")
        ax.plot(
            *zip(*[(run.d, run.loss) for run in runs if run.n == n] or [(np.nan,) * 2], strict=True), "o", color=colour
        )
    low, high = fitted.band(base["n"], base["d"])
    predicted = fitted.law.loss(base["n"], base["d"])
    off = 100 * (predicted / base["loss"] - 1)
    ax.errorbar(base["d"], predicted, [[predicted - low], [high - predicted]], color=COLOURS["black"], capsize=4)
    ax.plot(base["d"], base["loss"], "*", markersize=12, color=COLOURS["red"], label=f"base: predicted {off:+.0f} %")
    ax.set_xscale("log")
    ax.set(xlabel="training tokens", ylabel="held-out bits per byte", title="Small runs, and the base they did not see")
    ax.legend(fontsize=7)
    fig.supxlabel(source_note(results), fontsize=7)
    return fig


def bench(results: dict[str, Any]) -> Figure:
    """ScalingBench: score against the loss of the solutions, the small models' sigmoid, and who was not fitted."""
    nbytes = np.array(results["solution_bytes"])
    models = [Scored(m["name"], np.array(m["bits"]), np.array(m["right"], dtype=float)) for m in results["models"]]
    ours = [m for m, row in zip(models, results["models"], strict=True) if row["trained_by"] == "wind tunnel"]
    fitted = bootstrap_sigmoid(ours, nbytes, GUESSING, 60)
    losses = np.linspace(min(m.loss(nbytes) for m in models) * 0.9, max(m.loss(nbytes) for m in models) * 1.05, 80)
    fig, ax = plt.subplots()
    bands = np.array([fitted.band(loss) for loss in losses])
    ax.fill_between(losses, bands[:, 0], bands[:, 1], color=COLOURS["sky"], alpha=0.3, label="90 % band of a score")
    ax.plot(losses, [fitted.sigmoid.score(loss) for loss in losses], color=COLOURS["blue"])
    for model, row in zip(models, results["models"], strict=True):
        loss, small = model.loss(nbytes), row["trained_by"] == "wind tunnel"
        low, high = fitted.band(loss)
        inside = "inside" if low <= model.score() <= high else "outside"
        ax.plot(loss, model.score(), "o" if small else "*", markersize=4 if small else 12, color=COLOURS["black"])
        if not small:
            ax.annotate(
                f"{row['name']}, {inside}", (loss, model.score()), xytext=(8, 4), textcoords="offset points", fontsize=8
            )
    ax.axhline(GUESSING, linestyle=":", color=COLOURS["black"], linewidth=1)
    ax.set(xlabel="loss of the reference solutions, bits per byte", ylabel="share of questions answered right")
    ax.legend(fontsize=7)
    fig.supxlabel(source_note(results), fontsize=7)
    return fig
