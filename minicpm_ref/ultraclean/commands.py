"""`minicpm-ref clean files | verify | loop`: thin commands over `pipeline`, `verify` and `loop`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="Filter training data, and let training decide whether it helped.")
console = Console()

Inputs = Annotated[list[Path], typer.Argument(help="Folders or files: text, source, JSONL (.gz), Parquet.")]
CorpusFolder = Annotated[Path, typer.Option(help="Folder written by `minicpm-ref data`: the default data.")]


@app.command()
def files(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="Folder of the result; a begun run in it is continued.")] = Path("cleaned"),
    against: Annotated[
        list[Path] | None, typer.Option(help="Evaluation text that must not be in the result (repeat the option).")
    ] = None,
    classifier: Annotated[Path | None, typer.Option(help="Folder of a trained classifier, such as a round's.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Instead of the one it was calibrated to.")] = None,
    limit: Annotated[
        list[str] | None, typer.Option(help="Change a rule: min_too_short=10, max_symbols=0.4 (repeat the option).")
    ] = None,
    near: Annotated[float, typer.Option(help="Jaccard value from which on two documents are duplicates.")] = 0.8,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="Run the shards under Ray Data (extra `distributed`).")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first unreadable document.")] = False,
) -> None:
    """Clean folders: rules, decontamination, duplicates, classifier; every document kept or rejected with a reason."""
    from minicpm_ref.ultraclean.pipeline import CleanSettings, clean
    from minicpm_ref.ultraclean.workers import run_shards

    runner = run_shards
    if ray:
        from minicpm_ref.ultraclean.cluster import run_shards_on_ray as runner
    settings = CleanSettings(
        strict=strict, limits=parse_limits(limit or []), near_threshold=near,
        against=tuple(str(path.resolve()) for path in against or ()),
        classifier=str(classifier.resolve()) if classifier else None, threshold=threshold,
    )  # fmt: skip
    manifest = clean(inputs, out, settings, workers, runner, report=console.print)
    table = Table("stage", "reason", "documents")
    table.add_row("kept", "", f"{manifest['kept']:,}")
    for stage, reasons in manifest["rejected"].items():
        for reason, count in reasons.items():
            table.add_row(stage, reason, f"{count:,}")
    console.print(table)
    console.print(f"{manifest['documents']:,} documents; look at {out / 'report.html'}", soft_wrap=True)


def parse_limits(pairs: list[str]) -> dict[str, float]:
    """{"max_symbols": 0.4} of ["max_symbols=0.4"]. Raises ValueError for anything else."""
    limits = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        try:
            limits[name] = float(value)
        except ValueError:
            raise ValueError(f"--limit {pair!r}: expected NAME=NUMBER, such as max_symbols=0.4") from None
    return limits


@app.command()
def verify(
    inputs: Inputs,
    corpus: CorpusFolder = Path("corpus"),
    out: Annotated[Path, typer.Option(help="Folder of the runs; finished ones are not repeated.")] = Path("verified"),
    tokens: Annotated[int, typer.Option(help="Tokens of each decay.")] = 500_000,
    seeds: Annotated[int, typer.Option(min=2, help="Decays of each of the two mixtures.")] = 3,
    parent: Annotated[str, typer.Option(help="What to branch off: a state of the stable phase.")] = "stable",
) -> None:
    """Decide whether documents are better than the default data: anneal on 30 % of them, and on none."""
    from minicpm_ref.data import Corpus
    from minicpm_ref.ultraclean.loop import documents_of
    from minicpm_ref.ultraclean.verify import Verifier, VerifySettings, write_tokens

    default = Corpus(corpus)
    settings = VerifySettings(parent=parent, tokens=tokens, seeds=tuple(range(seeds)))
    write_tokens(out / "candidate.bin", (document.text for document in documents_of(inputs)), default.tokenizer)
    verifier = Verifier(default, settings, out / "runs.json", report=console.print)
    console.print(str(verifier.verify(out / "candidate.bin")))


@app.command()
def loop(
    pools: Inputs,
    verified: Annotated[list[Path], typer.Option(help="Documents that verified: the first seeds (repeat the option).")],
    corpus: CorpusFolder = Path("corpus"),
    out: Annotated[Path, typer.Option(help="Folder of the loop; a begun one is continued.")] = Path("loop"),
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seeds: Annotated[int, typer.Option(help="Good and bad seeds of a round, each.")] = 2000,
    tokens: Annotated[int, typer.Option(help="Tokens of each decay.")] = 500_000,
) -> None:
    """Seeds, classifier, filter, verification, and again; a round that does not verify is rolled back."""
    from minicpm_ref.data import Corpus
    from minicpm_ref.ultraclean.loop import LoopSettings, run_loop
    from minicpm_ref.ultraclean.verify import VerifySettings

    settings = LoopSettings(rounds=rounds, seeds=seeds, verify=VerifySettings(tokens=tokens))
    content = run_loop(verified, pools, Corpus(corpus), out, settings, report=console.print)
    result = content["result"]
    console.print(f"result: {out / result}" if result else "no round verified: there is no result", soft_wrap=True)
