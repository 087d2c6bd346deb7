"""Draw every figure of the README and the notebooks from figures/data: `make figures`.

One function a figure, registered in `FIGURES` under the name of the file it becomes (figures/<name>.svg and .png). A
function reads its data with `load_results`, which refuses numbers without device, versions, settings and date, and
returns the figure; it contains no number of its own. A figure whose data has not been measured yet is named and left
out.

Run: python figures/draw.py [NAME ...]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  # after the backend is chosen
from matplotlib.figure import Figure  # noqa: E402

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


# file name of the figure -> (file name of its data, the function that draws it)
FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], Figure]]] = {
    "rms_norm_cuda": ("rms_norm_cuda", rms_norm),
    "rms_norm_cpu": ("rms_norm_cpu", rms_norm),
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
            results = load_results(source, data)
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
