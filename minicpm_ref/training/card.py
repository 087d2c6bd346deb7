"""What is known about a set of weights, kept beside them as `card.json`: recipe, data, machine, time, loss, quality.

A number about the weights that is quoted anywhere comes from their card. Variants form a chain: the card of one that
was trained from others holds the hash of those, so weights can never silently hang on a base that was replaced.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minicpm_ref import checkpoint
from minicpm_ref.checkpoint import resolve, sha256_file, variant_folder, variants
from minicpm_ref.data import Corpus
from minicpm_ref.evaluate import quality_by_group
from minicpm_ref.machine import machine
from minicpm_ref.model import MiniCPM

if TYPE_CHECKING:
    from minicpm_ref.training.recipe import Recipe

CURVE_POINTS = 200  # the loss curve is averaged down to about this many points


def training_card(
    recipe: Recipe,
    corpus: Corpus,
    model: MiniCPM,
    rows: Sequence[dict[str, Any]],
    device: torch.device,
    precision: str,
    seconds: float,
) -> dict[str, Any]:
    """The card of a finished run, measuring `model` on every held-out file of `corpus`.

    `rows` are the lines of the run's metrics, one a step; `device`, `precision` and `seconds` say where, in which dtype
    and for how long it ran.
    """
    stride = max(1, len(rows) // CURVE_POINTS)
    blocks = [rows[start : start + stride] for start in range(0, len(rows), stride)]
    return {
        "recipe": recipe.to_dict(),
        "parent": parent_record(recipe.parent),
        "parameters": recipe.config.num_parameters(),
        "tokens": recipe.steps * recipe.batch_tokens,
        "corpus": {"manifest_sha256": corpus.manifest_sha256}
        | {key: corpus.manifest[key] for key in ("licences", "bytes", "train_tokens")},
        "machine": machine(device),
        "precision": precision,
        "seconds": round(seconds, 1),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "held_out_bits_per_byte": quality_by_group(model, corpus, recipe.context),
        "loss_curve": [[block[-1]["tokens"], round(sum(r["loss"] for r in block) / len(block), 4)] for block in blocks],
        "held_out_curve": [[row["tokens"], round(row["held_out"], 4)] for row in rows if "held_out" in row],
    }


def parent_folder(parent: str) -> Path:
    """Where the weights of a parent are: those of an embedded variant, of the embedded stable phase, or a folder."""
    return checkpoint.EMBEDDED / parent if parent in (*variants(), "stable") else resolve(parent)


def parent_record(parent: str | None) -> dict[str, str] | None:
    """Name and weight hash of what a run started from; None for fresh weights."""
    if parent is None:
        return None
    folder = parent_folder(parent)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        weights = folder / "state.safetensors"
    return {"name": parent, "weights_sha256": sha256_file(weights)}


def check_chain() -> None:
    """Raise ValueError naming the first embedded variant that does not descend from the embedded base or from its
    stable phase as they are now."""
    origins = {
        name: sha256_file(checkpoint.EMBEDDED / name / file)
        for name, file in (("base", "model.safetensors"), ("stable", "state.safetensors"))
    }
    for name in variants():
        card = json.loads((variant_folder(name) / "card.json").read_text("utf-8"))
        own = sha256_file(variant_folder(name) / "model.safetensors")
        if card["weights_sha256"] != own:
            raise ValueError(f"variant {name!r}: its weights hash to {own}, its card says {card['weights_sha256']}")
        parent = card["parent"]
        if (name == "base") != (parent is None):
            raise ValueError(f"variant {name!r}: parent is {parent!r}; only the base has none")
        if parent is not None and origins.get(parent["name"]) != parent["weights_sha256"]:
            raise ValueError(f"variant {name!r} was trained from {parent}, embedded are {origins}")
