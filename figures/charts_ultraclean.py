"""The chart of data cleaning: which copies go, and what training says about what was kept."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from minicpm_ref.plotting import COLOURS, source_note
from minicpm_ref.ultraclean import candidate_probability

POOLS = {"raw": ("raw", "red"), "rules": ("rules, duplicates", "orange"), "classifier": ("and classifier", "green")}


def ultraclean(results: dict[str, Any]) -> Figure:
    """Copies that went by their Jaccard value, bits per byte of models on three pools, and the rounds of the loop."""
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(8.6, 3.2), gridspec_kw={"width_ratios": [1.2, 1, 1]})
    clean = results["settings"]["clean"]
    line = torch.linspace(0.3, 1, 200)
    curve = 100 * candidate_probability(line, clean["bands"], clean["rows"])
    left.plot(line, curve, color=COLOURS["black"], label="share a band (theory)")
    threshold = clean["near_threshold"]
    left.axvline(threshold, color=COLOURS["orange"], linestyle="--", linewidth=1, label="threshold")
    bins = results["duplicates"]["gone_and_all_by_jaccard_value"]
    shown = {float(place): counts for place, counts in bins.items() if float(place) >= 0.3}
    points = [(place + 0.025, 100 * gone / every) for place, (gone, every) in shown.items()]
    left.plot(*zip(*points, strict=True), "o", color=COLOURS["blue"], label="went (recorded)")
    left.set(xlabel="Jaccard value with its original", title="copies that go, %", ylim=(-4, 104))
    left.legend(fontsize=7, loc="upper left")
    runs = results["training"]["held_out_bits_per_byte"]
    for x, (name, (label, colour)) in enumerate(POOLS.items()):
        values = list(runs[name].values())
        middle.plot([x] * len(values), values, "o", color=COLOURS[colour], markersize=5)
        middle.plot(x, sum(values) / len(values), "_", color=COLOURS["black"], markersize=22)
        middle.annotate(label, (x, max(values)), xytext=(0, 6), textcoords="offset points", fontsize=7, ha="center")
    middle.set(xticks=[], title="held-out bits per byte", xlabel="small models on equal tokens")
    middle.margins(x=0.3, y=0.2)
    for record in results["loop"]["rounds"]:
        decision, kept = record["decision"], record["kept"]
        if decision is None:
            continue
        colour = COLOURS["green" if kept else "red"]
        right.errorbar(
            record["round"], decision["gain"], 2 * decision["error"], fmt="o", color=colour, capsize=4, markersize=5
        )
        right.annotate(
            "kept" if kept else "rolled back", (record["round"], decision["gain"]), xytext=(8, 0),
            textcoords="offset points", fontsize=7, va="center",
        )  # fmt: skip
    right.axhline(0, color=COLOURS["black"], linewidth=0.8)
    right.set(xticks=[record["round"] for record in results["loop"]["rounds"]], xlabel="round")
    right.set_title("gain in bits per byte (2 standard errors)")
    right.margins(x=0.5, y=0.2)
    fig.supxlabel(source_note(results), fontsize=7)
    return fig
