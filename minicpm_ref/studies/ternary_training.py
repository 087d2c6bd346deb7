"""What ternary weights cost the embedded model, and what each stage of training gives back.

Five sets of weights on the same held-out files: the base; the base rounded to ternary without any training (PTQ);
after quantization-aware training, which branches off the base's stable phase; after distillation; and the control, a
decay in full precision off the same stable phase that ends at 50 million tokens, where the ternary variant has not read
more. The gap of the variant to the control is what ternary weights cost at equal tokens; its gap to the base is what a
user gains or loses by taking it.

Packed weights are measured twice: with float activations, as trained, and with the int8 activations of the fast CPU
kernel.

Run after the recipes `ternary_qat` and `ternary`, and `base` with `--tokens 50000000 --out runs/branch_50m`:
python -m minicpm_ref.studies.ternary_training CORPUS RUNS-FOLDER
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from minicpm_ref.checkpoint import EMBEDDED, load, sha256_file, variant_folder
from minicpm_ref.data import Corpus
from minicpm_ref.evaluate import quality_by_group
from minicpm_ref.lowbit.layers import MergedTernaryLinear, TernaryLinear, to_ternary
from minicpm_ref.lowbit.packing import size_report
from minicpm_ref.model import MiniCPM
from minicpm_ref.studies.record import Record
from minicpm_ref.training import load_parent

RUNS = {"control": "branch_50m", "qat": "ternary_qat", "qat+distillation": "ternary"}


def set_activations(model: MiniCPM, activations: str | None) -> None:
    """Let every packed layer of `model` multiply "float" or "int8" activations (None: the fastest here)."""
    for module in model.modules():
        if isinstance(module, (TernaryLinear, MergedTernaryLinear)):
            module.activations = activations


def measure(corpus: Corpus, runs: Path, folder: Path | None = None, report: Callable[[str], None] = print) -> Record:
    """Measure every row that is not yet in figures/data/ternary_training.json, and write it."""
    hashes = {name: sha256_file(runs / place / "model" / "model.safetensors") for name, place in RUNS.items()}
    hashes["base"] = sha256_file(variant_folder("base") / "model.safetensors")
    stable = json.loads((EMBEDDED / "stable" / "card.json").read_text("utf-8"))
    settings = {"weights_sha256": hashes, "context": 512, "stable_tokens": stable["tokens"]}
    record = Record("ternary_training", corpus, settings, folder)
    rows = record.results.setdefault("rows", [])
    models: dict[str, Callable[[], MiniCPM]] = {
        "base": lambda: load()[0],
        "ptq": lambda: _rounded(load()[0]),
        **{name: partial(load_parent, str(runs / place / "model")) for name, place in RUNS.items()},
    }
    for name, build in models.items():
        if any(row["name"] == name for row in rows):
            continue
        model = build()
        set_activations(model, "float")
        row = {"name": name, "held_out_bits_per_byte": quality_by_group(model, corpus, 512)}
        if any(isinstance(module, TernaryLinear) for module in model.modules()):
            set_activations(model, "int8")
            row["with_int8_activations"] = quality_by_group(model, corpus, 512)
        if name in RUNS:
            card = json.loads((runs / RUNS[name] / "model" / "card.json").read_text("utf-8"))
            row |= {key: card[key] for key in ("tokens", "seconds", "held_out_curve")}
        rows.append(row)
        record.save()
        report(f"{name}: {row['held_out_bits_per_byte']}")
    report_of_file = size_report(runs / RUNS["qat+distillation"] / "model")
    record.results["size"] = asdict(report_of_file) | {
        "bits_per_weight": round(report_of_file.bits_per_weight, 4),
        "float16_bytes": report_of_file.float16_bytes,
    }
    record.save()
    return record


def _rounded(model: MiniCPM) -> MiniCPM:
    to_ternary(model)
    return model


def main(
    corpus: Annotated[Path, typer.Argument(help="Folder written by `minicpm-ref data --reuse-tokenizer`.")],
    runs: Annotated[Path, typer.Argument(help="Folder that holds the runs ternary_qat, ternary and branch_50m.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the results. Default: figures/data.")] = None,
) -> None:
    """Measure every stage of ternary training on the held-out files. An interrupted run is continued."""
    measure(Corpus(corpus), runs, out)


if __name__ == "__main__":
    typer.run(main)
