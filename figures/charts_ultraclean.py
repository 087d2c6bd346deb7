"""The chart of data cleaning: which copies go, and what training says about what was kept."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minicpm_ref.plotting import COLOURS, source_note
from minicpm_ref.ultraclean import candidate_probability

POOLS = {"raw": ("raw", "red"), "rules": ("rules, duplicates", "orange"), "classifier": ("and classifier", "green")}


def ultraclean(results: dict[str, Any]) -> Figure:
    """Copies that went by their Jaccard value, bits per byte of models on three pools, and the rounds of the loop."""
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(8.6, 3.2), gridspec_kw={"width_ratios": [1.2, 1, 1]})
    _copies(left, results)
    for ax, part, draw in ((middle, "training", _pools), (right, "loop", _rounds)):
        if results.get(part):
            draw(ax, results[part])
        else:
            ax.set_axis_off()
            ax.annotate(f"{part}: not measured yet", (0.5, 0.5), xycoords="axes fraction", fontsize=8, ha="center")
    fig.supxlabel(source_note(results), fontsize=7)
    return fig


def _copies(ax: Axes, results: dict[str, Any]) -> None:
    """Share of the copies that went, by their Jaccard value, on the curve of the bands."""
    clean = results["settings"]["clean"]
    line = torch.linspace(0.3, 1, 200)
    curve = 100 * candidate_probability(line, clean["bands"], clean["rows"])
    ax.plot(line, curve, color=COLOURS["black"], label="share a band (theory)")
    ax.axvline(clean["near_threshold"], color=COLOURS["orange"], linestyle="--", linewidth=1, label="threshold")
    bins = results["duplicates"]["gone_and_all_by_jaccard_value"]
    shown = {float(place): counts for place, counts in bins.items() if float(place) >= 0.3}
    points = [(place + 0.025, 100 * gone / every) for place, (gone, every) in shown.items()]
    ax.plot(*zip(*points, strict=True), "o", color=COLOURS["blue"], label="went (recorded)")
    ax.set(xlabel="Jaccard value with its original", title="copies that go, %", ylim=(-4, 104))
    ax.legend(fontsize=7, loc="upper left")


def _pools(ax: Axes, training: dict[str, Any]) -> None:
    """Bits per byte of small models on each pool, a dot a seed."""
    for x, (name, (label, colour)) in enumerate(POOLS.items()):
        values = list(training["held_out_bits_per_byte"][name].values())
        ax.plot([x] * len(values), values, "o", color=COLOURS[colour], markersize=5)
        ax.plot(x, sum(values) / len(values), "_", color=COLOURS["black"], markersize=22)
        ax.annotate(label, (x, max(values)), xytext=(0, 6), textcoords="offset points", fontsize=7, ha="center")
    ax.set(xticks=[], title="held-out bits per byte", xlabel="small models on equal tokens")
    ax.margins(x=0.3, y=0.2)


def _rounds(ax: Axes, loop: dict[str, Any]) -> None:
    """Gain of each round against what was held before it."""
    for record in loop["rounds"]:
        if record["decision"] is None:  # nothing passed the threshold, so nothing was trained
            continue
        gain, error = record["decision"]["gain"], 2 * record["decision"]["error"]
        colour = COLOURS["green" if record["kept"] else "red"]
        ax.errorbar(record["round"], gain, error, fmt="o", color=colour, capsize=4, markersize=5)
        verdict, place = "kept" if record["kept"] else "rolled back", (record["round"], gain)
        ax.annotate(verdict, place, xytext=(8, 0), textcoords="offset points", fontsize=7, va="center")
    ax.axhline(0, color=COLOURS["black"], linewidth=0.8)
    ax.set(xticks=[record["round"] for record in loop["rounds"]], xlabel="round")
    ax.set_title("gain in bits per byte (2 standard errors)")
    ax.margins(x=0.5, y=0.2)
