"""Draw every figure of the README and the notebooks from figures/data: `make figures`.

One function a figure, registered in `FIGURES` under the name of the file it becomes (figures/<name>.svg and .png). A
function reads its data with `load_results`, which refuses numbers without device, versions, settings and date, and
returns the figure; it contains no number of its own. A figure whose data has not been measured yet is named and left
out.

Run: python figures/draw.py [NAME ...]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  # after the backend is chosen
from matplotlib.figure import Figure  # noqa: E402

from minicpm_ref.checkpoint import EMBEDDED  # noqa: E402
from minicpm_ref.plotting import COLOURS, load_results, save_figure, source_note, styled  # noqa: E402


def rms_norm(results: dict[str, Any]) -> Figure:
    """Bandwidth that each RMSNorm reaches against a plain copy of the same size, measured in the same run."""
    functions = ("rms_norm", "add_rms_norm")
    colours = {"copy": "black", "triton": "blue", "torch": "orange", "reference": "purple"}
    width = max(row["width"] for row in results["rows"])
    fig, axes = plt.subplots(1, len(functions), sharey=True)
    for ax, function in zip(axes, functions, strict=True):
        for name, colour in colours.items():
            wanted = ("copy", "torch") if name == "copy" else (function, name)
            rows = [
                row
                for row in results["rows"]
                if (row["function"], row["implementation"], row["width"]) == (*wanted, width)
            ]
            if rows:
                speeds = [row["bytes"] / row["median_us"] / 1e3 for row in rows]
                ax.plot([row["tokens"] for row in rows], speeds, "o-", color=COLOURS[colour], label=name)
        ax.set(xscale="log", xlabel=f"rows of {width}", title=function)
    axes[0].set(yscale="log", ylabel="GB/s of the bytes that must move")
    axes[0].legend()
    fig.supxlabel(source_note(results), fontsize=7)
    return fig


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


def base_card() -> dict[str, Any]:
    """The card of the embedded base weights, in the form of a results file."""
    card = json.loads((EMBEDDED / "base" / "card.json").read_text("utf-8"))
    machine = card["machine"]
    versions = {"torch": machine["torch"], "python": machine["python"]}
    return card | {"device": machine["device"], "versions": versions, "settings": card["recipe"]}


# file name of the figure -> (file name of its data, or what gives it; the function that draws it)
FIGURES: dict[str, tuple[str | Callable[[], dict[str, Any]], Callable[[dict[str, Any]], Figure]]] = {
    "rms_norm_cuda": ("rms_norm_cuda", rms_norm),
    "rms_norm_cpu": ("rms_norm_cpu", rms_norm),
    "sweep": ("sweep", sweep),
    "base_training": (base_card, base_training),
}


def draw(names: list[str], data: Path | None = None, folder: Path | None = None) -> None:
    """Draw the named figures, or all. Raises ValueError for a name that is not registered."""
    unknown = sorted(set(names) - set(FIGURES))
    if unknown:
        raise ValueError(f"no figure is called {unknown}; there are {sorted(FIGURES)}")
    for name, (source, function) in FIGURES.items():
        if names and name not in names:
            continue
        try:
            results = load_results(source, data) if isinstance(source, str) else source()
        except FileNotFoundError:
            print(f"{name}: figures/data/{source}.json has not been measured yet")
            continue
        with styled():
            fig = function(results)
            paths = save_figure(fig, name, folder)
        plt.close(fig)
        print(f"{name}: wrote {' and '.join(path.name for path in paths)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="draw the figures from figures/data")
    parser.add_argument("names", nargs="*", help="figures to draw; all of them if none is named")
    draw(parser.parse_args().names)
