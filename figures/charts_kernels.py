"""The charts of what the kernels reach: each takes the results of one benchmark of kernels/bench and returns a
figure.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

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


# how the product of packed weights is called in the legends, and its colour in every figure
TERNARY = {
    "ternary_int8": ("this project", "blue"),
    "TQ2_0": ("ggml TQ2_0", "orange"),
    "TQ1_0": ("ggml TQ1_0", "red"),
    "Q4_0": ("ggml Q4_0", "purple"),
    "torch_bfloat16": ("torch bfloat16", "green"),
    "torch_float32": ("torch float32", "black"),
}


def ternary_matmul(results: dict[str, Any]) -> Figure:
    """The ternary product on a CPU: what it reads a second at one token, and what it multiplies a second at more."""
    products = [row for row in results["rows"] if row["kind"] == "product"]
    shape = max(products, key=lambda row: row["out"] * row["in"])["shape"]
    products = [row for row in products if row["shape"] == shape]
    names = [name for name in TERNARY if any(row["implementation"] == name for row in products)]
    limits = [row for row in results["rows"] if row["kind"] == "read_limit"]
    fig, (left, right) = plt.subplots(1, 2)
    _reading(left, products, limits, names)
    for name in names:
        rows = [row for row in products if (row["implementation"], row["threads"]) == (name, limits[0]["threads"])]
        speeds = [row["out"] * row["in"] * row["tokens"] / row["median_us"] / 1e3 for row in rows]
        label, colour = TERNARY[name]
        right.plot([row["tokens"] for row in rows], speeds, "o-", markersize=4, color=COLOURS[colour], label=label)
    for row in results["rows"]:
        if row["kind"] == "vnni_peak":
            peak = row["macs"] / row["min_us"] / 1e3
            right.axhline(peak, color="black", linestyle=":")
            words = "peak of the instruction"
            right.annotate(words, (1, peak), xytext=(0, 3), textcoords="offset points", fontsize=6)
    right.set(xlabel=f"tokens, matrix {shape}")
    right.set_title("GMAC/s, 1 thread" if limits[0]["threads"] == 1 else "GMAC/s", pad=4 + 9 * len(limits))
    _log_axes(right, sorted({row["tokens"] for row in products}))
    words = "colours as on the left"
    right.annotate(words, (0.98, 0.03), xycoords="axes fraction", fontsize=6, ha="right")
    fig.supxlabel(source_note(results), fontsize=7)
    return fig


def _reading(ax: Axes, products: list[dict[str, Any]], limits: list[dict[str, Any]], names: list[str]) -> None:
    """Bars of the bytes of weights that each implementation reads a second at one token, and lines where reading
    ends; paler for each further number of threads.
    """
    height = 0.8 / len(limits)
    for i, limit in enumerate(limits):
        words = "1 thread" if limit["threads"] == 1 else f"{limit['threads']} threads"
        shade = 1 - 0.5 * i / max(1, len(limits) - 1)
        speed = limit["bytes"] / limit["min_us"] / 1e3
        ax.axvline(speed, color="black", linestyle="--", linewidth=1, alpha=shade)
        ax.annotate(
            f"read limit, {words}", (speed, 1), xytext=(2, 2 + 9 * i), xycoords=ax.get_xaxis_transform(),
            textcoords="offset points", fontsize=6, ha="right", annotation_clip=False,
        )  # fmt: skip
        for row in products:
            if (row["tokens"], row["threads"]) != (1, limit["threads"]):
                continue
            y = names.index(row["implementation"]) + (i - (len(limits) - 1) / 2) * height
            reached = row["weight_bytes"] / row["median_us"] / 1e3
            ax.barh(y, reached, height, color=COLOURS[TERNARY[row["implementation"]][1]], alpha=shade)
            ax.annotate(
                f"{row['median_us'] / 1e3:.3g} ms", (reached, y), xytext=(3, -0.5), textcoords="offset points",
                fontsize=6, va="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
    ax.set_yticks(range(len(names)), [TERNARY[name][0] for name in names])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="GB/s of weights")
    ax.set_title("one token", pad=4 + 9 * len(limits))


def ternary_matmul_gpu(results: dict[str, Any]) -> Figure:
    """The ternary product on a GPU: its share of the speed of a copy at one token, and its gain over bfloat16."""
    copy = next(row for row in results["rows"] if row["implementation"] == "copy")
    fastest = copy["bytes"] / copy["median_us"]
    kinds = {
        "torch_bfloat16": ("torch bfloat16", "green"),
        "ternary": ("ternary, float activations", "blue"),
        "int8": ("ternary, int8 activations", "orange"),
    }
    products = [row for row in results["rows"] if "out" in row]
    rows = {(row["implementation"], row["out"], row["in"], row["tokens"]): row for row in products}
    shapes = sorted({key[1:3] for key in rows}, key=lambda shape: shape[0] * shape[1])
    counts = sorted({key[3] for key in rows})
    fig, (left, right) = plt.subplots(1, 2, gridspec_kw={"width_ratios": [1.15, 1]})
    for i, (name, (label, colour)) in enumerate(kinds.items()):
        at = [(y, rows[name, *shape, 1]) for y, shape in enumerate(shapes) if (name, *shape, 1) in rows]
        shares = [100 * row["bytes"] / row["median_us"] / fastest for _, row in at]
        left.barh([y + (1 - i) * 0.27 for y, _ in at], shares, 0.27, color=COLOURS[colour], label=label)
        if name == "torch_bfloat16":
            continue
        for shape, line in ((shapes[-1], "o-"), (shapes[0], "o:")):
            found = [count for count in counts if (name, *shape, count) in rows]
            gains = [
                rows["torch_bfloat16", *shape, count]["median_us"] / rows[name, *shape, count]["median_us"]
                for count in found
            ]
            words = f"{name}, {shape[0]} x {shape[1]}"
            right.plot(found, gains, line, markersize=4, color=COLOURS[colour], label=words)
    left.axvline(100, color="black", linestyle="--", linewidth=1)
    left.set_yticks(range(len(shapes)), [f"{out} x {columns}" for out, columns in shapes])
    left.grid(axis="y", visible=False)
    left.set(xlabel="bytes read a second, % of a copy's", title="one token")
    left.legend(fontsize=6, loc="lower right")
    right.axhline(1, color="black", linestyle="--", linewidth=1)
    right.set(xlabel="tokens", title="times as fast as bfloat16")
    _log_axes(right, counts)
    right.legend(fontsize=6)
    fig.supxlabel(source_note(results), fontsize=7)
    return fig


def sparse_attention(results: dict[str, Any]) -> Figure:
    """Block-sparse attention on a GPU: gain over the fastest dense kernel and over sparse ones, and share of the
    floor.
    """
    ours = {"forward": "blue", "forward+backward": "green", "end to end": "orange", "decode": "purple"}
    rows = [
        row
        for row in results["rows"]
        if row.get("batch") == 1 and row["blocks"] == 96 and row.get("lists", "selected") == "selected"
    ]
    fig, (left, right) = plt.subplots(1, 2)
    for function, colour in ours.items():
        mine = [
            row
            for row in rows
            if row["function"] == function and row["implementation"] in ("union", "sparse") and "ms" in row
        ]
        mine.sort(key=lambda row: row["tokens"])
        lengths = [row["tokens"] / 1024 for row in mine]
        right.plot(lengths, [100 * row["share_of_floor"] for row in mine], "o-", color=COLOURS[colour], label=function)
        peers = {name for row in mine for name in row["faster_than"]}
        dense = [[gain for name, gain in row["faster_than"].items() if name.startswith("sdpa")] for row in mine]
        gains = [(length, min(gain)) for length, gain in zip(lengths, dense, strict=True) if gain]
        if gains:
            left.plot(*zip(*gains, strict=True), "o-", color=COLOURS[colour], label=f"dense, {function}")
        for peer, line in (("token", "--"), ("flex", ":")):
            if function == "forward" and peer in peers:
                points = [(x, row["faster_than"][peer]) for x, row in zip(lengths, mine, strict=True)
                          if peer in row["faster_than"]]  # fmt: skip
                words = {"token": "one token a program", "flex": "FlexAttention"}[peer]
                left.plot(*zip(*points, strict=True), "o" + line, color=COLOURS[colour], label=f"{words}, {function}")
    left.axhline(1, color="black", linestyle="--", linewidth=1)
    left.set(title="times as fast as")
    right.set(title="% of the floor")
    for ax in (left, right):
        ax.set(xlabel="tokens, in 1024")
        _log_axes(ax, sorted({row["tokens"] // 1024 for row in rows}))
        ax.legend(fontsize=6)
    right.set(yscale="linear", ylim=(0, 100))
    fig.supxlabel(source_note(results), fontsize=7)
    return fig


def sparse_attention_cpu(results: dict[str, Any]) -> Figure:
    """Time of sparse and of dense attention on a CPU over the length, both stages included, and where they cross."""
    looks = {
        "sparse": ("blue", "o-", "sparse, both stages"),
        "sdpa_gqa": ("orange", "s--", "dense, shared heads"),
        "sdpa_repeat": ("purple", "^--", "dense, keys repeated"),
        "sdpa_folded": ("green", "^--", "dense, heads as queries"),
        "sparse_all_blocks": ("sky", "o--", "this kernel, all blocks"),
    }
    fig, axes = plt.subplots(1, 2)
    panels = {
        "decode": ("decoding: one token over a cache", "ms", 1),
        "prefill": ("prefill: a whole prompt", "s", 1000),
    }
    for ax, (kind, (title, unit, of_ms)) in zip(axes, panels.items(), strict=True):
        rows = [row for row in results["rows"] if row["kind"] == kind]
        lengths = sorted({row["tokens"] / 1024 for row in rows})
        for name, (colour, line, label) in looks.items():
            mine = [row for row in rows if row["implementation"] == name]
            points = sorted((row["tokens"] / 1024, row["median_ms"] / of_ms) for row in mine)
            if points:
                ax.plot(*zip(*points, strict=True), line, color=COLOURS[colour], label=label, markersize=5)
        for row in results["rows"]:
            if row["kind"] == "crossover" and row["phase"] == kind and row["tokens"] is not None:
                at = row["tokens"] / 1024
                where = "at all lengths" if at <= lengths[0] else f"from {at:.1f} on"
                ax.axvline(at, color="black", linestyle=":", linewidth=1, label=f"sparse is faster {where}")
        ax.set(title=title, xlabel="tokens, in 1024", ylabel=f"{unit}, median of the run")
        _log_axes(ax, lengths)
        ax.set_ylim(top=8 * max(row["median_ms"] for row in rows) / of_ms)  # room for the legend
        ax.legend(fontsize=6, loc="upper left", frameon=True, framealpha=1, edgecolor="none")
    fig.supxlabel(f"{source_note(results)}, {results['settings']['threads']} threads, float32", fontsize=7)
    return fig


def _log_axes(ax: Axes, counts: list[int] | list[float]) -> None:
    """Both axes logarithmic, with ticks at the counts that were measured and at 1, 2, 5 of each power of ten."""
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(counts)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.minorticks_off()
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
    ax.margins(x=0.08)
