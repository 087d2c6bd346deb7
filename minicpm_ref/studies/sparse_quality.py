"""What block-sparse attention costs and buys: the `sparse` variant run dense, sparse, and in two ways that cannot work.

Four ways to attend with the same weights, all but the first with the same number of visible blocks:
- *dense*: everything before the token;
- *sparse*: InfLLM-V2, as trained;
- *window*: the first block and the nearest ones, what is left of sparse attention without the choice;
- *random*: the first block, the window of the trained setting, and blocks drawn at random instead of chosen.

Measured: held-out bits per byte by length on the same text, retrieval accuracy by distance (facts and words that
training never saw), and how much of the dense attention's mass the chosen blocks hold, by budget. The base is measured
too: what long training changed is the difference to it.

Run: python -m minicpm_ref.studies.sparse_quality CORPUS
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer
from torch import Tensor

from minicpm_ref.checkpoint import load, sha256_file, variant_folder
from minicpm_ref.config import SparseConfig
from minicpm_ref.data import Corpus
from minicpm_ref.evaluate import bits_per_byte
from minicpm_ref.model import Attention, MiniCPM
from minicpm_ref.sparse import block_scores, pick_blocks, query_positions
from minicpm_ref.studies.record import Record
from minicpm_ref.training.planted_facts import Planter, retrieval_accuracy

MODES = ("dense", "sparse", "window", "random")
LENGTHS = (512, 1024, 2048, 4096)
DISTANCES = (64, 128, 256, 512, 1024, 1900, 3800)
BUDGETS = (10, 12, 16, 24, 32, 48, 64, 96, 128, 256)  # visible blocks


def window_only(config: SparseConfig) -> SparseConfig:
    """As many visible blocks as `config`, but all of them the first blocks and the nearest ones."""
    topk = config.init_blocks + (1 if config.local_inclusive else 0)
    return replace(config, topk=topk, window_size=(config.visible_blocks - topk) * config.block_size)


def random_blocks(
    q: Tensor,
    k: Tensor,
    config: SparseConfig,
    query_start: int | Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    compressed: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A rival of `select_blocks` that draws instead of choosing; forced blocks stay. Seeded by the length alone."""
    groups, keys = k.shape[1:3]
    shape = (q.shape[0], groups, q.shape[2], math.ceil(keys / config.block_size))
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(keys)).to(q.device)
    return pick_blocks(scores, query_positions(q, k, query_start, lengths), config)


def attention_layers(model: MiniCPM) -> list[Attention]:
    """The attention modules, first layer first."""
    return [module for module in model.modules() if isinstance(module, Attention)]


@contextmanager
def attending(model: MiniCPM, mode: str) -> Iterator[None]:
    """Let `model`, which has a `sparse_config`, attend in one of `MODES` inside the block."""
    config = model.config.sparse_config
    if config is None or mode not in MODES:
        raise ValueError(f"mode {mode!r}: expected one of {', '.join(MODES)}, and a model with a sparse_config")
    layers = attention_layers(model)
    for layer in layers:
        layer.sparse = {"dense": None, "window": window_only(config)}.get(mode, config)
        layer.selector = random_blocks if mode == "random" else None
    try:
        yield
    finally:
        for layer in layers:
            layer.sparse, layer.selector = config, None


def long_pieces(corpus: Corpus, tokens: int, count: int) -> list[str]:
    """The first `count` pieces of about `tokens` tokens that held-out files can be cut into."""
    pieces: list[str] = []
    for document in corpus.held_out:
        ids = corpus.tokenizer.encode(document.text, add_bos=False)
        starts = range(0, len(ids) - tokens + 2, tokens - 1)  # <s> takes one place
        pieces += [corpus.tokenizer.decode(ids[start : start + tokens - 1]) for start in starts]
    if len(pieces) < count:
        raise ValueError(f"held-out text gives {len(pieces)} pieces of {tokens} tokens: expected {count}")
    stride = len(pieces) // count
    return pieces[::stride][:count]


def block_mass(q: Tensor, k: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Dense attention probability that lies in each block, averaged over the heads of a group: [B, G, T, N]."""
    batch, groups, keys, width = k.shape
    grouped = q.unflatten(1, (groups, -1))
    logits = grouped @ k[:, :, None].transpose(-1, -2) / math.sqrt(width)  # [B, G, h, T, S]
    hidden = torch.arange(keys) > positions[:, None, None, :, None]
    weights = logits.masked_fill(hidden, -math.inf).softmax(-1).mean(2)
    padded = torch.nn.functional.pad(weights, (0, -keys % block_size))
    return padded.unflatten(-1, (-1, block_size)).sum(-1)


class RecallProbe:
    """Takes the place of `select_blocks`, lets every block be read, and notes what each budget would have kept.

    `recall[rule][budget]` is a list of mean shares of the dense mass, one a call, over the queries of the second half
    (nearly every block is visible to the first ones).
    """

    def __init__(self, budgets: Sequence[int]):
        self.recall: dict[str, dict[int, list[float]]] = {
            rule: {budget: [] for budget in budgets} for rule in ("chosen", "random", "best")
        }

    def __call__(self, q: Tensor, k: Tensor, config: SparseConfig, **options: object) -> Tensor:
        positions = query_positions(q, k)
        mass = block_mass(q, k, positions, config.block_size)
        generator = torch.Generator().manual_seed(0)
        scores = {
            "chosen": block_scores(q, k, config),
            "random": torch.rand(mass.shape, generator=generator),
            "best": mass,
        }
        late = q.shape[2] // 2
        for rule, by_budget in self.recall.items():
            for budget, shares in by_budget.items():
                budgeted = replace(config, topk=budget - config.window_blocks)
                blocks = pick_blocks(scores[rule], positions, budgeted)
                kept = mass.gather(-1, blocks.clamp(min=0).long()) * (blocks >= 0)
                shares.append(float(kept.sum(-1)[:, :, late:].mean()))
        everything = torch.arange(mass.shape[-1], dtype=torch.int32).expand(mass.shape)
        own = (positions // config.block_size)[:, None, :, None]
        return torch.where(everything <= own, everything, -1)


def measure(
    corpus: Corpus,
    folder: Path | None = None,
    lengths: Sequence[int] = LENGTHS,
    distances: Sequence[int] = DISTANCES,
    budgets: Sequence[int] = BUDGETS,
    pieces: int = 16,
    samples: int = 32,
    report: Callable[[str], None] = print,
) -> Record:
    """Measure everything above and write figures/data/sparse_quality.json; parts already there are kept."""
    model, tokenizer = load(variant="sparse")
    assert tokenizer is not None
    config = model.config.sparse_config
    assert config is not None
    longest = max(lengths)
    settings = {
        "weights_sha256": sha256_file(variant_folder("sparse") / "model.safetensors"),
        "sparse_config": asdict(config),
        "window_only": asdict(window_only(config)),
        "visible_share_at_longest": config.visible_blocks / math.ceil(longest / config.block_size),
        "pieces": pieces,
        "samples": samples,
        "longest": longest,
    }
    record = Record("sparse_quality", corpus, settings, folder)
    texts = long_pieces(corpus, longest, pieces)
    bits, retrieval, recall = (record.part(name) for name in ("bits_per_byte", "retrieval", "mass_recall"))

    base, _ = load()
    for length in lengths:
        values = bits.setdefault(str(length), {})
        for mode in ("base", *MODES):
            if mode in values:
                continue
            if mode == "base":
                values[mode] = round(bits_per_byte(base, tokenizer, texts, length), 4)
            else:
                with attending(model, mode):
                    values[mode] = round(bits_per_byte(model, tokenizer, texts, length), 4)
            record.save()
            report(f"bits per byte at {length} tokens, {mode}: {values[mode]}")

    planter = Planter(tokenizer, held_out=True)
    for mode in MODES:
        if mode not in retrieval:
            with attending(model, mode):
                accuracy = retrieval_accuracy(model, planter, corpus.held_out, longest, distances, samples)
            retrieval[mode] = {str(distance): round(value, 4) for distance, value in accuracy.items()}
            record.save()
            report(f"retrieval by distance, {mode}: {retrieval[mode]}")

    if not recall:
        probes = [RecallProbe(budgets) for _ in model.model.layers]
        for layer, probe in zip(attention_layers(model), probes, strict=True):
            layer.selector = probe
        with torch.no_grad():
            for text in texts[: max(1, pieces // 4)]:
                model(torch.tensor([tokenizer.encode(text)[:longest]]))
        for rule in probes[0].recall:
            recall[rule] = {
                str(budget): [round(fmean(probe.recall[rule][budget]), 4) for probe in probes] for budget in budgets
            }
        record.save()
        report(f"share of dense attention mass by budget and layer: {recall}")
    return record


def main(
    corpus: Annotated[Path, typer.Argument(help="Folder written by `minicpm-ref data --reuse-tokenizer`.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the results. Default: figures/data.")] = None,
) -> None:
    """Measure what sparse attention costs and buys the embedded variant. An interrupted run is continued."""
    measure(Corpus(corpus), out)


if __name__ == "__main__":
    typer.run(main)
