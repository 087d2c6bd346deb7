"""Draw every figure of the README and the notebooks from figures/data: `make figures`.

One function a figure, in a file of charts beside this one, registered in `FIGURES` under the name of the file it
becomes (figures/<name>.svg and .png). A function takes the data that `load_results` reads, which refuses numbers
without device, versions, settings and date, and returns the figure; it contains no number of its own. A figure whose
data has not been measured yet is named and left out.

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
import charts_kernels  # noqa: E402  # after the backend is chosen
import charts_training  # noqa: E402
import charts_ultraclean  # noqa: E402
import charts_wind_tunnel  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from minicpm_ref.checkpoint import EMBEDDED  # noqa: E402
from minicpm_ref.plotting import load_results, save_figure, styled  # noqa: E402


def base_card() -> dict[str, Any]:
    """The card of the embedded base weights, in the form of a results file."""
    card = json.loads((EMBEDDED / "base" / "card.json").read_text("utf-8"))
    machine = card["machine"]
    versions = {"torch": machine["torch"], "python": machine["python"]}
    return card | {"device": machine["device"], "versions": versions, "settings": card["recipe"]}


# file name of the figure -> (file name of its data, or what gives it; the function that draws it)
FIGURES: dict[str, tuple[str | Callable[[], dict[str, Any]], Callable[[dict[str, Any]], Figure]]] = {
    "rms_norm_cuda": ("rms_norm_cuda", charts_kernels.rms_norm),
    "rms_norm_cpu": ("rms_norm_cpu", charts_kernels.rms_norm),
    "ternary_matmul": ("ternary_matmul_cpu", charts_kernels.ternary_matmul),
    "ternary_matmul_gpu": ("ternary_matmul_gpu", charts_kernels.ternary_matmul_gpu),
    "sparse_attention": ("sparse_attention", charts_kernels.sparse_attention),
    "sparse_attention_cpu": ("sparse_attention_cpu", charts_kernels.sparse_attention_cpu),
    "sweep": ("sweep", charts_training.sweep),
    "sparse_quality": ("sparse_quality", charts_training.sparse_quality),
    "ternary_training": ("ternary_training", charts_training.ternary_training),
    "ternary_ablation": ("ternary_ablation", charts_training.ternary_ablation),
    "ultraclean": ("ultraclean", charts_ultraclean.ultraclean),
    "wind_tunnel_coordinates": ("wind_tunnel_coordinates", charts_wind_tunnel.coordinates),
    "wind_tunnel_rates": ("wind_tunnel_rates", charts_wind_tunnel.rates),
    "wind_tunnel_law": ("wind_tunnel_law", charts_wind_tunnel.law),
    "wind_tunnel_bench": ("wind_tunnel_bench", charts_wind_tunnel.bench),
    "base_training": (base_card, charts_training.base_training),
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
