"""Two questions about ternary training, asked of a model small enough to be trained dozens of times.

*When to start.* All runs read the same number of tokens in all; the last 0, 10, 20, 40, 60 or 100 % of them
quantization-aware, after full-precision training that was decayed to its end. How little QAT is enough?

*Which grid.* From one and the same full-precision checkpoint, the last 40 % on each of the five grids of
`ternary.GRIDS`, and, as a control, in full precision.

Each point is trained with three seeds, because the differences are of the size of the noise. The learning rate of QAT
is warmed up again to half of the first stage's, as in the report. Sources: MiniCPM4 technical report (arXiv 2506.07900)
figure 5; BitCPM-CANN report section 3.1 (its order of convergence: five values, ternary, the two symmetric grids
without zero, the asymmetric one).

Run: python -m minicpm_ref.studies.ternary_ablation CORPUS
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from minicpm_ref.checkpoint import save
from minicpm_ref.data import Corpus, small_sample
from minicpm_ref.evaluate import bits_per_byte
from minicpm_ref.lowbit.ternary import GRIDS
from minicpm_ref.model import MiniCPM
from minicpm_ref.studies.record import Record
from minicpm_ref.training import Recipe, Trainer
from minicpm_ref.training.recipes.ternary_qat import TernaryRecipe
from minicpm_ref.wind_tunnel.sweep import PROXY

TOKENS = 204_800  # of every run, both stages together
FRACTIONS = (0.0, 0.1, 0.2, 0.4, 0.6, 1.0)
GRID_FRACTION = 0.4
SEEDS = (0, 1, 2)


def train(recipe: Recipe, corpus: Corpus) -> MiniCPM:
    """The model that `recipe` ends with, as trained (a quantization-aware one is not packed)."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, corpus, folder)
        for _ in range(recipe.steps):
            trainer.train_step()
        return trainer.whole_model()


def measure(
    corpus: Corpus,
    folder: Path | None = None,
    tokens: int = TOKENS,
    seeds: Sequence[int] = SEEDS,
    report: Callable[[str], None] = print,
) -> Record:
    """Train all runs and write figures/data/ternary_ablation.json; runs already there are not repeated."""
    base = Recipe(
        "ablation",
        PROXY.config(corpus.tokenizer.vocab_size),
        tokens,
        context=256,
        batch_tokens=2048,
        warmup_tokens=tokens // 20,
        decay=0.4,
    )
    settings = {"recipe": base.to_dict(), "fractions": FRACTIONS, "grid_fraction": GRID_FRACTION, "seeds": list(seeds)}
    record = Record("ternary_ablation", corpus, settings, folder)
    runs = record.part("runs")
    texts = [document.text for document in small_sample(corpus.held_out, 100_000)]

    def run(name: str, recipe: Recipe, kind: str, **facts: object) -> MiniCPM | None:
        if name in runs:
            return None
        model = train(recipe, corpus)
        quality = round(bits_per_byte(model, corpus.tokenizer, texts, recipe.context), 4)
        runs[name] = {"kind": kind, "seed": recipe.seed % 100, **facts, "held_out_bits_per_byte": quality}
        record.save()
        report(f"{name}: {quality} bits per byte")
        return model

    for seed in seeds:
        first = replace(base, seed=seed)
        run(f"full precision, seed {seed}", first, "fraction", fraction=0.0, grid=None)
        scratch = TernaryRecipe(**_fields(first))
        run(f"QAT from scratch, seed {seed}", scratch, "fraction", fraction=1.0, grid="ternary")
        for fraction in FRACTIONS[1:-1]:
            grids = [grid for grid in GRIDS if grid == "ternary" or fraction == GRID_FRACTION]
            names = {grid: f"{fraction:.0%} {grid}, seed {seed}" for grid in grids}
            control = f"{fraction:.0%} full precision, seed {seed}" if fraction == GRID_FRACTION else None
            if all(name in runs for name in [*names.values(), *([control] if control else [])]):
                continue
            with tempfile.TemporaryDirectory() as start:
                save(train(replace(first, tokens=round((1 - fraction) * tokens)), corpus), start)
                second = replace(
                    first,
                    tokens=round(fraction * tokens),
                    lr=first.lr / 2,
                    matrix_lr=first.matrix_lr / 2,
                    seed=100 + seed,
                    parent=start,
                )
                for grid, name in names.items():
                    kind = "fraction" if grid == "ternary" else "grid"
                    run(name, TernaryRecipe(**_fields(second), grid=grid), kind, fraction=fraction, grid=grid)
                if control:
                    run(control, second, "control", fraction=fraction, grid=None)
    return record


def _fields(recipe: Recipe) -> dict:
    return {name: getattr(recipe, name) for name in recipe.__dataclass_fields__}


def main(
    corpus: Annotated[Path, typer.Argument(help="Folder written by `minicpm-ref data --reuse-tokenizer`.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the results. Default: figures/data.")] = None,
) -> None:
    """Train dozens of small models: when to start QAT, and on which grid. An interrupted run is continued."""
    measure(Corpus(corpus), out)


if __name__ == "__main__":
    typer.run(main)
