"""The charts of what the kernels reach: each takes the results of one benchmark of kernels/bench and returns a
figure.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from minicpm_ref.plotting import COLOURS, source_note


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
