"""One style for every figure, and the rule that a figure is drawn from recorded data.

The problem: figures drawn in ten notebooks by ten hands differ in colour and size, and a number in a picture cannot
be traced.
The idea: `style` sets what all figures share; `load_results` reads a file of figures/data and refuses one
that does not say on which device, with which versions and settings, and when it was measured; `save_figure` writes
SVG and PNG, the same bytes for the same data, so that a redrawn figure is a diff only when its data changed.

The colours are those of Okabe and Ito (Color Universal Design, 2008), which people with any common colour blindness
can tell apart. Their order is fixed: give a thing the same colour in every figure by taking it from `COLOURS` by
name.

matplotlib is imported inside the functions: `import minicpm_ref` stays fast and works without it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: dict[str, str] = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "black": "#000000",
}
REQUIRED = ("device", "versions", "settings", "date")
FIGURES = Path(__file__).resolve().parents[1] / "figures"

_RC: dict[str, Any] = {
    "figure.figsize": (6.4, 3.6),
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine draws the same letters
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "svg.hashsalt": "minicpm_ref",  # ids inside an SVG come from this, not from a random number
    "svg.fonttype": "path",
}


def style() -> dict[str, Any]:
    """The settings of every figure, for `matplotlib.pyplot.rcParams.update` (a notebook) or
    `matplotlib.rc_context`."""
    from matplotlib.rcsetup import cycler

    return {**_RC, "axes.prop_cycle": cycler(color=list(COLOURS.values()))}


def use_style() -> None:
    """Make the style the default of this process: the first plotting line of a notebook."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(style())


@contextmanager
def styled() -> Iterator[None]:
    """The style inside a `with` block, and what was set before after it."""
    import matplotlib

    with matplotlib.rc_context(style()):
        yield


def load_results(name: str, folder: Path | str | None = None) -> dict[str, Any]:
    """The recorded results figures/data/<name>.json.

    `folder` replaces figures/data of this checkout. Raises FileNotFoundError if there is no such file, ValueError if
    it is no JSON object or does not record its device, versions, settings and date.
    """
    where = FIGURES / "data" if folder is None else Path(folder)
    path = where / f"{name}.json"
    if not path.is_file():
        known = sorted(file.stem for file in where.glob("*.json"))
        raise FileNotFoundError(f"no results called {name!r} in {where.parent.name}/{where.name}; there are {known}")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(results, dict):
        raise ValueError(f"{path.name} holds a {type(results).__name__}, expected an object")
    for key in REQUIRED:
        if not results.get(key):
            raise ValueError(f"{path.name} does not record {key!r}; results need {', '.join(REQUIRED)}")
    return results


def source_note(results: Mapping[str, Any]) -> str:
    """One line for the foot of a figure: where and when its data was measured."""
    device = results["device"]
    name = device.get("name") or device.get("cpu") if isinstance(device, Mapping) else device
    versions = results["versions"]
    torch_version = versions.get("torch") if isinstance(versions, Mapping) else versions
    return f"measured {str(results['date'])[:10]} on {name}, torch {torch_version}"


def save_figure(fig: Figure, name: str, folder: Path | str | None = None) -> list[Path]:
    """Write figures/<name>.svg and .png (`folder` replaces figures/) and return their paths.

    The same figure gives the same bytes: no date and no version of matplotlib is written into the files.
    """
    import matplotlib

    where = FIGURES if folder is None else Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    paths = [where / f"{name}.svg", where / f"{name}.png"]
    with matplotlib.rc_context({"svg.hashsalt": name}):
        fig.savefig(paths[0], metadata={"Date": None, "Creator": None})
        fig.savefig(paths[1], metadata={"Software": None})
    return paths


def attainable(intensity: float, bandwidth: float, peak: float) -> float:
    """The roofline: FLOP/s that a machine can reach at `intensity` FLOPs a byte.

    bandwidth in byte/s, peak in FLOP/s. Source: Williams, Waterman and Patterson, Roofline, CACM 2009.
    """
    if bandwidth <= 0 or peak <= 0 or intensity < 0:
        raise ValueError(f"intensity {intensity}, bandwidth {bandwidth}, peak {peak}: expected positive numbers")
    return min(intensity * bandwidth, peak)


def draw_roofline(
    ax: Axes, bandwidth: float, peak: float, points: Mapping[str, tuple[float, float | None]], label: str = ""
) -> None:
    """Draw one machine's roofline and kernels under it, on logarithmic axes.

    bandwidth in byte/s, peak in FLOP/s; `points` maps a name to (intensity in FLOP/byte, measured FLOP/s), or None as
    the second for a prediction, which is drawn hollow and on the roof.
    """
    ridge = peak / bandwidth
    intensities = [x for x, _ in points.values()] + [ridge]
    low, high = math.floor(math.log10(min(intensities) / 2)), math.ceil(math.log10(max(intensities) * 2))
    corners = [10.0**low, ridge, 10.0**high]
    ax.loglog(corners, [attainable(x, bandwidth, peak) for x in corners], color=COLOURS["black"], label=label)
    colours = [colour for name, colour in COLOURS.items() if name != "black"]
    for i, (name, (x, measured)) in enumerate(points.items()):
        y = attainable(x, bandwidth, peak) if measured is None else measured
        colour = colours[i % len(colours)]
        ax.plot(x, y, "o", color=colour, markerfacecolor="white" if measured is None else colour, markersize=7)
        side = "right" if x > ridge else "left"  # below the roof either way, and inside the axes
        ax.annotate(name, (x, y), xytext=(6, -14), textcoords="offset points", fontsize=8, ha=side)
    ax.set_xlabel("arithmetic intensity, FLOP/byte")
    ax.set_ylabel("FLOP/s")
