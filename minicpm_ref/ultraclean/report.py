"""The report page: what each stage threw away, with samples, so that a person can look.

The problem: a count says how much a rule rejects, not whether it is right to; and documents hold markup, which a
careless report runs as script.
The idea: one HTML file without scripts, fonts or pictures from anywhere: counts by stage and reason, counts by group of
files, the largest clusters of duplicates, the histogram of scores, and for each reason up to eight samples chosen by a
hash of their id (so that the page is the same for the same input). Everything that comes from the input is escaped.
"""

from __future__ import annotations

import hashlib
import heapq
import html
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from minicpm_ref.files import write_text
from minicpm_ref.ultraclean.dedup import candidate_probability
from minicpm_ref.ultraclean.filters import RULES

SAMPLES = 8
WHY = {rule.name: rule.why for rule in RULES} | {
    "exact_duplicate": "the same bytes as a document before it",
    "near_duplicate": "its word shingles are nearly those of a document before it",
    "contaminated": "holds text of an evaluation item",
    "low_score": "the classifier scores it below the threshold",
    "undecodable": "not UTF-8",
    "cut_off": "the file ends in the middle",
    "bad_json": "a line that is not JSON",
    "no_text": "a record without a text",
    "text_not_a_string": "the text of a record is something else",
    "not_an_object": "a line of JSON that is no record",
    "not_unicode": "half of a surrogate pair",
    "too_large": "longer than a reader may hold in memory",
    "no_records": "an empty file",
    "not_entered": "a folder or file that is not read",
    "unreadable": "the system or the library refused",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
table { border-collapse: collapse; margin: .5rem 0 1.5rem }
td, th { padding: .2rem .8rem; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #0072B2 } td { border-bottom: 1px solid #ddd; overflow-wrap: anywhere }
td.n { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f4f5f7; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0 .8rem }
summary { cursor: pointer; font-weight: 600 } .bar { background: #0072B2; height: .8rem }
.warn { color: #A33B00; font-weight: 600 }
.id { color: #57606a; overflow-wrap: anywhere }
"""


_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def escaped(value: object) -> str:
    """Any value as text of an HTML page: markup, quotes, control characters and lone surrogates become harmless."""
    text = str(value).encode("utf-8", "backslashreplace").decode("utf-8")
    return html.escape(_CONTROL.sub(lambda c: f"\\x{ord(c[0]):02x}", text), quote=True)


def table(head: list[str], rows: list[list[object]]) -> str:
    """An HTML table; whole numbers and percentages stand on the right."""
    lines = ["<table><tr>" + "".join(f"<th>{escaped(name)}</th>" for name in head) + "</tr>"]
    for row in rows:
        cells = ""
        for value in row:
            number = isinstance(value, int | float)
            shown = f"{value:,}" if isinstance(value, int) else value
            cells += f'<td class="n">{escaped(shown)}</td>' if number else f"<td>{escaped(shown)}</td>"
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def samples(folder: Path, count: int = SAMPLES) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(stage, reason) -> the `count` rejected documents with the smallest hash of their id, read file by file."""
    chosen: dict[tuple[str, str], list[tuple[int, int, dict[str, Any]]]] = {}
    for i, row in enumerate(_rejected(folder)):
        rank = int.from_bytes(hashlib.sha256(row["id"].encode()).digest()[:8])
        heap = chosen.setdefault((row["stage"], row["reason"]), [])
        entry = (-rank, -i, row)
        if len(heap) < count:
            heapq.heappush(heap, entry)
        elif entry[:2] > heap[0][:2]:
            heapq.heapreplace(heap, entry)
    return {key: [row for *_, row in sorted(heap, key=lambda e: e[:2], reverse=True)] for key, heap in chosen.items()}


def _rejected(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((folder / "rejected").glob("*.jsonl")):
        with open(path, "rb") as file:
            for line in file:
                yield json.loads(line)


def page(manifest: dict[str, Any], chosen: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """The whole page of a finished run, as text."""
    total, kept = manifest["documents"], manifest["kept"]
    settings = manifest["settings"]
    parts = [
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>UltraClean report</title>",
        f"<style>{STYLE}</style></head><body><h1>What was kept, and what was not</h1>",
        f"<p>{total:,} documents in {len(manifest['inputs']):,} files: {kept:,} kept "
        f"({100 * kept / max(total, 1):.1f} %), {total - kept:,} rejected. Every one is in one line of this table.</p>",
    ]
    rows: list[list[object]] = [["kept", "", kept, ""]]
    for stage, reasons in manifest["rejected"].items():
        rows += [[stage, reason, count, WHY.get(reason, "")] for reason, count in reasons.items()]
    parts.append(table(["stage", "reason", "documents", "why"], rows))
    idle = [rule.name for rule in RULES if rule.name not in manifest["rejected"].get("rules", {})]
    for reason in [reason for reasons in manifest["rejected"].values() for reason, n in reasons.items() if n == total]:
        parts.append(f'<p class="warn">{escaped(reason)} rejected every document: look at its limit.</p>')
    if idle:
        parts.append(f"<p>Rules that rejected nothing here: {escaped(', '.join(idle))}.</p>")
    names = sorted({stage for counter in manifest["groups"].values() for stage in counter} - {"kept"})
    rows = [[g, c.get("kept", 0), *(c.get(n, 0) for n in names)] for g, c in manifest["groups"].items()]
    parts += ["<h2>By group of files</h2>", table(["group", "kept", *names], rows)]
    parts += ["<h2>Duplicates</h2>", _curve(settings), _clusters(manifest["clusters"])]
    if settings["against"]:
        short = manifest["too_short_to_match"]
        names_of_short = f"{len(short)}. {escaped(', '.join(short[:20]))}"
        parts.append(f"<h2>Decontamination</h2><p>Items too short to match: {names_of_short}</p>")
    if manifest["scores"]:
        parts.append(_histogram(manifest["scores"], manifest["threshold"]))
    parts.append("<h2>Samples of what was rejected</h2>")
    for (stage, reason), rejected in sorted(chosen.items()):
        parts.append(f"<details><summary>{escaped(stage)}: {escaped(reason)}</summary>")
        for row in rejected:
            why = f"{escaped(row['id'])} ({row['characters']:,} characters): {escaped(row['detail'])}"
            parts.append(f'<p class="id">{why}</p>')
            parts.append(f"<pre>{escaped(row['excerpt'])}</pre>")
        parts.append("</details>")
    parts.append(f"<h2>Settings and versions</h2><pre>{escaped(json.dumps(settings, indent=1))}\n")
    parts.append(f"{escaped(json.dumps(manifest['versions'], indent=1))}</pre></body></html>\n")
    return "\n".join(parts)


def _curve(settings: dict[str, Any]) -> str:
    values = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9])
    found = candidate_probability(values, settings["bands"], settings["rows"]).tolist()
    words = ", ".join(f"{100 * p:.1f} % at {s:.1f}" for p, s in zip(found, values.tolist(), strict=True))
    return (
        f"<p>{settings['bands']} bands of {settings['rows']} rows find this share of pairs, by Jaccard value: {words}. "
        f"What is found is compared exactly, and goes from {settings['near_threshold']:g} on; the first in input order "
        "stays.</p>"
    )


def _clusters(found: list[dict[str, Any]]) -> str:
    if not found:
        return "<p>No duplicates.</p>"
    rows: list[list[object]] = []
    for cluster in found:
        note = f"most of {', '.join(cluster['most_of'])}: look at it" if cluster["most_of"] else ""
        rows.append([cluster["kept"], cluster["removed"], note])
    return table(["largest clusters: kept", "removed", "note"], rows)


def _histogram(scores: list[int], threshold: float) -> str:
    lines = [f"<h2>Scores</h2><p>Threshold {threshold:.3g}; bars on a logarithmic scale.</p><table>"]
    top = math.log1p(max(scores))
    for i, count in enumerate(scores):
        width = 100 * math.log1p(count) / top if top else 0
        bar = f'<div class="bar" style="width:{width:.1f}%"></div>'
        edges = f"{i / len(scores):.2f} to {(i + 1) / len(scores):.2f}"
        lines.append(f'<tr><td>{edges}</td><td class="n">{count:,}</td><td style="width:24rem">{bar}</td></tr>')
    return "\n".join([*lines, "</table>"])


def write_report(folder: Path, manifest: dict[str, Any]) -> Path:
    """Write `report.html` of a finished run and return its path."""
    path = folder / "report.html"
    write_text(path, page(manifest, samples(folder)))
    return path
