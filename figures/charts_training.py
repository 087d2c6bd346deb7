"""The charts of training: how runs went, and what was found on the way. Each takes results and returns a figure."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from minicpm_ref.plotting import COLOURS, source_note


def sweep(results: dict[str, Any]) -> Figure:
    """What the wind-tunnel sweep found: learning rates on a narrow proxy, then shapes of the real size."""
    runs = results["runs"]
    fig, (left, right) = plt.subplots(1, 2, gridspec_kw={"width_ratios": [1, 1.15]})
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, run in runs.items():
        if name.startswith(("muon", "adamw")):
            recipe = run["recipe"]
            curve = f"Muon, matrices {recipe['matrix_lr']}" if recipe["optimizer"] == "muon" else "AdamW, muP groups"
            curves.setdefault(curve, []).append((recipe["lr"], run["held_out_bits_per_byte"]))
    for curve, points in curves.items():
        left.plot(*zip(*sorted(points), strict=True), "o-", label=curve)
    left.set(xscale="log", xlabel="base learning rate", ylabel="held-out bits per byte", title="rates, width 128")
    left.set_xticks(sorted({lr for points in curves.values() for lr, _ in points}))
    left.xaxis.set_major_formatter("{x:g}")
    left.minorticks_off()
    left.legend(fontsize=7)
    shapes = {name.removeprefix("shape "): run for name, run in runs.items() if name.startswith("shape")}
    for i, (name, run) in enumerate(shapes.items()):
        x, y = run["tokens_per_second"], run["held_out_bits_per_byte"]
        right.plot(x, y, "o", color=COLOURS["blue"])
        offset = (0, 7 if i % 2 else -22)  # neighbours above and below, so that they do not overlap
        words = name.replace(", ffn", "\nffn")
        right.annotate(words, (x, y), xytext=offset, textcoords="offset points", fontsize=7, ha="center")
    right.margins(x=0.3, y=0.25)
    right.set(xlabel="training tokens/s", ylabel="held-out bits per byte", title="shapes, same tokens each")
    fig.supxlabel(source_note(results), fontsize=7)
    return fig


def base_training(results: dict[str, Any]) -> Figure:
    """Loss of the embedded base model as it was trained, and its held-out bits per byte."""
    fig, (left, right) = plt.subplots(1, 2)
    decay = (1 - results["settings"]["decay"]) * results["tokens"] / 1e6
    for ax, key, label in (
        (left, "loss_curve", "training loss, nats a token"),
        (right, "held_out_curve", "held-out bits per byte (small sample)"),
    ):
        tokens, values = zip(*results[key], strict=True)
        ax.plot([count / 1e6 for count in tokens], values, color=COLOURS["blue"])
        ax.axvline(decay, color=COLOURS["orange"], linestyle="--", linewidth=1)
        ax.annotate(
            "decay begins",
            (decay, 0.95),
            xytext=(-4, 0),
            xycoords=ax.get_xaxis_transform(),
            textcoords="offset points",
            fontsize=8,
            ha="right",
        )
        ax.set(xlabel="million tokens", title=label)
    left.set_ylim(top=min(6.5, max(value for _, value in results["loss_curve"])))
    fig.supxlabel(source_note(results), fontsize=7)
    return fig
