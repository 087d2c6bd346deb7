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


# how the ways to attend are called in every figure, and their colours
ATTENTION = {
    "base": ("base, dense", "black"),
    "dense": ("dense", "orange"),
    "sparse": ("sparse", "blue"),
    "window": ("window only", "green"),
    "random": ("random blocks", "purple"),
}


def sparse_quality(results: dict[str, Any]) -> Figure:
    """What sparse attention costs and buys: bits per byte by length, retrieval by distance, recalled attention."""
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(8.6, 3.4))
    for mode, (label, colour) in ATTENTION.items():
        points = [(int(length), values[mode]) for length, values in results["bits_per_byte"].items()]
        if mode == "base":  # far above the others where it was not trained: as numbers, not as a curve
            words = ", ".join(f"{value:.2f}" for _, value in points)
            left.annotate(f"{label}: {words}", (0.04, 0.03), xycoords="axes fraction", fontsize=7)
            continue
        left.plot(*zip(*points, strict=True), "o-", markersize=4, color=COLOURS[colour], label=label)
        if mode in results["retrieval"]:
            points = [(int(distance), 100 * share) for distance, share in results["retrieval"][mode].items()]
            middle.plot(*zip(*points, strict=True), "o-", markersize=4, color=COLOURS[colour], label=label)
    left.set(xscale="log", xlabel="tokens a sequence", title="held-out bits per byte")
    lengths = [int(length) for length in results["bits_per_byte"]]
    distances = [int(distance) for distance in next(iter(results["retrieval"].values()))]
    for ax, ticks in ((left, lengths), (middle, distances)):
        ax.set_xscale("log")
        ax.set_xticks(ticks)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        ax.tick_params(axis="x", labelsize=7)
    left.legend(fontsize=7)
    reach = results["settings"]["window_only"]["window_size"]
    middle.axvline(reach, color=COLOURS["green"], linestyle="--", linewidth=1)
    middle.annotate(
        "its window", (reach, 0.62), xytext=(3, 0), xycoords=middle.get_xaxis_transform(), textcoords="offset points",
        fontsize=7, color=COLOURS["green"],
    )  # fmt: skip
    middle.set(xlabel="distance in tokens", ylim=(-3, 103), title="facts retrieved, %")
    for rule, label, colour in (
        ("best", "largest first", "black"),
        ("chosen", "chosen", "blue"),
        ("random", "at random", "purple"),
    ):
        by_budget = results["mass_recall"][rule]
        shares = [100 * sum(layers) / len(layers) for layers in by_budget.values()]
        budgets = [int(budget) for budget in by_budget]
        right.plot(budgets, shares, "o-", markersize=4, color=COLOURS[colour], label=label)
    config = results["settings"]["sparse_config"]
    visible = config["topk"] + config["window_size"] // config["block_size"]
    right.axvline(visible, color="black", linestyle="--", linewidth=1)
    right.set(xlabel="visible blocks", ylim=(0, 103), title="attention mass recalled, %")
    right.legend(fontsize=7)
    fig.supxlabel(source_note(results), fontsize=7)
    return fig


STAGES = {
    "base": ("base, full precision", "black"),
    "ptq": ("rounded, no training", "red"),
    "qat": ("QAT", "blue"),
    "qat+distillation": ("QAT + distillation", "green"),
    "control": ("control: full precision,\nas many tokens", "orange"),
}


def ternary_training(results: dict[str, Any]) -> Figure:
    """Held-out quality of each stage of ternary training against the base, and how the runs got there."""
    rows = {row["name"]: row for row in results["rows"]}
    fig, (left, right) = plt.subplots(1, 2)
    for y, (name, (_, colour)) in enumerate(STAGES.items()):
        value = rows[name]["held_out_bits_per_byte"]["all"]
        left.barh(y, value, 0.6, color=COLOURS[colour])
        left.annotate(f"{value:.3f}", (value, y), xytext=(3, 0), textcoords="offset points", fontsize=8, va="center")
    left.set_yticks(range(len(STAGES)), [label for label, _ in STAGES.values()], fontsize=8)
    left.invert_yaxis()
    left.margins(x=0.18)
    left.grid(axis="y", visible=False)
    left.set(title="held-out bits per byte")
    stable = results["settings"]["stable_tokens"]
    begins = {"control": 0, "qat": stable, "qat+distillation": stable + rows["qat"]["tokens"]}
    for name, begin in begins.items():
        label, colour = STAGES[name]
        curve = [(begin + tokens, value) for tokens, value in rows[name]["held_out_curve"]]
        points = [(tokens / 1e6, value) for tokens, value in curve if tokens > 0.6 * stable]
        right.plot(*zip(*points, strict=True), "o-", markersize=4, color=COLOURS[colour], label=label)
    right.set(xlabel="million tokens in all", title="on the way (small sample)")
    right.legend(fontsize=7)
    fig.supxlabel(source_note(results), fontsize=7)
    return fig


GRIDS = {
    "five": "-2, -1, 0, 1, 2",
    "ternary": "-1, 0, 1",
    "half4": "-1.5, -0.5, 0.5, 1.5",
    "nonzero4": "-2, -1, 1, 2",
    "asymmetric4": "-2, -1, 0, 1",
    None: "full precision",
}


def ternary_ablation(results: dict[str, Any]) -> Figure:
    """When to start QAT, and on which grid; every dot is a run, lines and bars are means over seeds."""
    runs = results["runs"].values()
    fig, (left, right) = plt.subplots(1, 2)
    curve: dict[float, list[float]] = {}
    for run in runs:
        if run["kind"] == "fraction":
            curve.setdefault(100 * run["fraction"], []).append(run["held_out_bits_per_byte"])
    whole = curve.pop(0)
    left.axhline(sum(whole) / len(whole), color=COLOURS["black"], linestyle="--", linewidth=1)
    left.annotate("full precision", (100, sum(whole) / len(whole)), xytext=(0, 3), textcoords="offset points",
                  fontsize=7, ha="right")  # fmt: skip
    for x, values in curve.items():
        left.plot([x] * len(values), values, ".", color=COLOURS["sky"])
    left.plot(sorted(curve), [sum(curve[x]) / len(curve[x]) for x in sorted(curve)], color=COLOURS["blue"])
    left.set(xlabel="% of all tokens under QAT", ylabel="held-out bits per byte", title="when to start")
    at = results["settings"]["grid_fraction"]
    for y, (grid, label) in enumerate(GRIDS.items()):
        values = [
            run["held_out_bits_per_byte"] for run in runs if run["grid"] == grid and run["fraction"] == at
        ]
        right.plot(sum(values) / len(values), y, "|", color=COLOURS["blue"], markersize=18, markeredgewidth=2)
        right.plot(values, [y] * len(values), ".", color=COLOURS["sky"])
        right.annotate(label, (min(values), y), xytext=(0, 10), textcoords="offset points", fontsize=7)
    right.set_yticks([])
    right.margins(x=0.12)
    right.set_ylim(len(GRIDS) - 0.5, -0.9)
    right.set(xlabel="held-out bits per byte", title=f"which grid, {at:.0%} of tokens")
    fig.supxlabel(source_note(results), fontsize=7)
    return fig
