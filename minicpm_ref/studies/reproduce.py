"""Does the recipe make the embedded weights? The first steps of the run, and the first behind the stored state.

The card of `weights/stable` holds the losses that the run itself recorded: of steps 1 to 20, and of the 20 steps that
followed the stored state. This study takes both stretches again with the recipe as it is today, on a corpus of the
same manifest, and writes the losses side by side. They are not equal bit for bit: the run multiplied in bfloat16, and
another machine may multiply in float32 (a product then differs by up to 2^-9 of itself); the state is stored in 16
bits; and each step adds to the difference of the one before.

Run it with `python -m minicpm_ref.studies.reproduce CORPUS`, about five minutes on two cores.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from minicpm_ref.checkpoint import EMBEDDED
from minicpm_ref.data import Corpus
from minicpm_ref.studies.record import Record
from minicpm_ref.training import Recipe, Trainer
from minicpm_ref.training.recipes.base import RECIPE

BOUND = 0.002  # of a loss: one rounding to bfloat16
STRETCHES = {"from_step_0": None, "from_here": "stable"}


def measure(
    corpus: Corpus, folder: Path | None = None, recipe: Recipe = RECIPE, report: Callable[[str], None] = print
) -> Record:
    """Take both stretches and write figures/data/reproduce.json; a stretch that is already there is kept.

    Raises ValueError for a corpus of another manifest, whose batches would be others.
    """
    card: dict[str, Any] = json.loads((EMBEDDED / "stable" / "card.json").read_text("utf-8"))
    if corpus.manifest_sha256 != card["corpus"]["manifest_sha256"]:
        raise ValueError(
            f"{corpus.folder}: manifest {corpus.manifest_sha256[:16]}, expected "
            f"{card['corpus']['manifest_sha256'][:16]}; see the recipe `base` for how its corpus is built"
        )
    record = Record("reproduce", corpus, {"state_sha256": card["state_sha256"], "bound": BOUND}, folder)
    for name, branch in STRETCHES.items():
        part, recorded = record.part(name), card[f"losses_{name}"]
        if part:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            trainer = Trainer(replace(recipe, branch=branch), corpus, scratch)
            losses = [round(trainer.train_step()["loss"], 5) for _ in recorded]
        part |= {"precision": trainer.precision, "recorded": recorded, "losses": losses}
        record.save()
        report(f"{name}: largest difference {difference(part):.2%} of the loss")
    return record


def difference(part: dict[str, Any]) -> float:
    """The largest relative difference between recorded and repeated losses of one stretch."""
    return max(abs(a - b) / a for a, b in zip(part["recorded"], part["losses"], strict=True))


def main(
    corpus: Annotated[Path, typer.Argument(help="Folder written by `minicpm-ref data --reuse-tokenizer`.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the results. Default: figures/data.")] = None,
) -> None:
    """Repeat stretches of the embedded base's training and compare the losses."""
    measure(Corpus(corpus), out)


if __name__ == "__main__":
    typer.run(main)
