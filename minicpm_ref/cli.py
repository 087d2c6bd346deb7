"""The command line: `minicpm-ref tour | generate | eval | info | data | train | clean`.

Each command is a thin layer over one public function, so that whatever is shown here can be done in a few lines of
Python.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from minicpm_ref.config import PRESETS, ModelConfig
from minicpm_ref.files import read_text
from minicpm_ref.machine import usable_device
from minicpm_ref.terminal import accept_any_text, show
from minicpm_ref.tokenizer import Tokenizer, stream_text
from minicpm_ref.ultraclean import commands as clean_commands
from minicpm_ref.wind_tunnel import commands as wind_tunnel_commands

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="MiniCPM4.1 from scratch: run it, measure it, train it. Start with [bold]minicpm-ref tour[/bold].",
    rich_markup_mode="rich",
)
app.add_typer(clean_commands.app, name="clean")
app.add_typer(wind_tunnel_commands.app, name="wind-tunnel")
console = Console(emoji=False)

Source = Annotated[
    str | None,
    typer.Option(
        "--weights", help="A folder, a .gguf file, a hub id, or 'smollm2'. Default: the weights inside this package."
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")]
Prompt = Annotated[
    str | None,
    typer.Option(help="Text to continue. End without a line break: one token holds a break and an indentation."),
]
PromptFile = Annotated[Path | None, typer.Option(help="UTF-8 file whose text is continued; of a long one, the end.")]
Escapes = Annotated[
    bool, typer.Option("--escapes", help=r"Read \n, \t and \\ in --prompt as line break, tab and backslash.")
]
DEFAULT_PROMPT = "import os\nimport sys\n\n\nclass Reader:\n    def __init__(self, path):"


@app.command()
def tour(
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    escapes: Escapes = False,
    weights: Source = None,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path("tour.png"),
) -> None:
    """Load real weights, continue a text, and measure everything that exists so far. Takes under two minutes."""
    from minicpm_ref.tour import run_tour

    run_tour(console, read_prompt(prompt, prompt_file, escapes), weights, device, out)


@app.command()
def generate(
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    escapes: Escapes = False,
    weights: Source = None,
    variant: Annotated[str, typer.Option(help="Which of the embedded weights.")] = "base",
    device: Device = "cpu",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the completion in tokens.")] = 120,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.6,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")] = 40,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens that reach this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt in a user turn (for instruction-tuned weights).")
    ] = False,
    think: Annotated[bool, typer.Option(help="With --chat: let the model reason before it answers.")] = True,
) -> None:
    """Continue a text and stream it to the terminal. A prompt that does not fit the model's context loses its
    beginning, a conversation is refused; writing ends where the context does."""
    from minicpm_ref import checkpoint, sampling

    text = read_prompt(prompt, prompt_file, escapes)
    params = sampling.SamplingParams(temperature, top_k, top_p, seed=seed)
    model, tokenizer = checkpoint.load(weights, device, variant=variant)
    if tokenizer is None:
        raise ValueError(f"{weights}: no tokenizer.json in the folder, so a text cannot be encoded")
    context = model.config.max_position_embeddings
    room = context - min(max_new_tokens, context // 2)  # for the prompt
    if chat:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], enable_thinking=think)
        if len(ids) > room:
            raise ValueError(f"the conversation has {len(ids)} tokens: expected at most {room} of {context}")
    else:
        ids, text = fit_prompt(tokenizer, text, room)
        show(console, text)
    length = min(max_new_tokens, context - len(ids))
    tokens = sampling.generate(model, torch.tensor([ids], device=device), length, params, tokenizer.eos_ids)
    for piece in stream_text(tokenizer, tokens, continues=not chat):
        show(console, piece)
    console.print()


@app.command(name="eval")
def evaluate(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Text files to measure. Default: the embedded held-out sample.")
    ] = None,
    weights: Source = None,
    variant: Annotated[str, typer.Option(help="Which of the embedded weights.")] = "base",
    device: Device = "cpu",
    context: Annotated[int, typer.Option(min=1, help="Window in tokens.")] = 512,
) -> None:
    """Measure bits per byte: how well the model predicts a text (lower is better; gzip needs about 2 on code)."""
    from minicpm_ref import checkpoint, data
    from minicpm_ref.evaluate import bits_per_byte

    model, tokenizer = checkpoint.load(weights, device, variant=variant)
    if tokenizer is None:
        raise ValueError(f"{weights}: no tokenizer.json in the folder, so a text cannot be encoded")
    if files:
        groups = {str(path): [read_text(path)] for path in files}
    else:
        documents = data.read_held_out(checkpoint.EMBEDDED / "held_out.jsonl")
        groups = {
            name: [d.text for d in documents if d.group == name] for name in dict.fromkeys(d.group for d in documents)
        }
    for name, texts in groups.items():
        show(console, f"{bits_per_byte(model, tokenizer, texts, context):.3f} bits per byte  {name}\n")


@app.command()
def info(
    config: Annotated[str, typer.Argument(help=f"A config.json, or one of: {', '.join(PRESETS)}.")] = "minicpm4.1-8b",
    bandwidth: Annotated[
        float | None, typer.Option(help="Memory bandwidth in GB/s. Default: measured on this machine.")
    ] = None,
) -> None:
    """Show this machine, which kernels it runs and why, and the arithmetic of a model: memory, and the fastest possible
    decode."""
    from minicpm_ref.tour import show_info

    show_info(
        console, ModelConfig.preset(config) if config in PRESETS else ModelConfig.from_json(config), config, bandwidth
    )


@app.command()
def data(
    out: Annotated[Path, typer.Option(help="Folder for the corpus.")] = Path("corpus"),
    groups: Annotated[str, typer.Option(help="Comma-separated sources to use. Default: all that are present.")] = "",
    vocab_size: Annotated[int, typer.Option(help="Tokens in the vocabulary learned from it.")] = 4096,
    reuse_tokenizer: Annotated[bool, typer.Option(help="Use the embedded vocabulary instead of learning one.")] = False,
) -> None:
    """Build the training corpus from the Python source on this machine (about 100 MB; one to two minutes)."""
    from rich.table import Table

    from minicpm_ref import checkpoint
    from minicpm_ref.data import build_corpus, find_roots

    tokenizer = Tokenizer.load(checkpoint.EMBEDDED / "base" / "tokenizer.json") if reuse_tokenizer else None
    roots = find_roots(groups.split(",") if groups else None)
    corpus = build_corpus(out, roots, vocab_size, tokenizer, report=console.print)
    table = Table("group", "licence", "files", "train MB", "held-out MB")
    for group, licence in sorted(corpus.manifest["licences"].items()):
        count = sum(file["group"] == group for file in corpus.manifest["files"])
        sizes = [f"{corpus.manifest['bytes'].get(f'{group}/{split}', 0) / 1e6:.2f}" for split in ("train", "held_out")]
        table.add_row(group, licence, str(count), *sizes)
    console.print(table)
    tokens = f"{corpus.manifest['train_tokens']:,} training tokens"
    show(console, f"{tokens}, manifest {corpus.manifest_sha256[:16]}, in {out}/\n")


@app.command()
def train(
    recipe: Annotated[str, typer.Option(help="Name of a file in minicpm_ref/training/recipes/.")] = "base",
    corpus: Annotated[Path, typer.Option(help="Folder written by `minicpm-ref data`.")] = Path("corpus"),
    out: Annotated[Path | None, typer.Option(help="Folder of the run; an unfinished run in it is continued.")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Train on this many tokens instead of the recipe's number.")
    ] = None,
    device: Device = "cpu",
    sharding: Annotated[
        str, typer.Option(help="Under torchrun: 'ddp' copies the weights, 'fsdp' shards them.")
    ] = "ddp",
    seed: Annotated[int | None, typer.Option(help="Another seed than the recipe's.")] = None,
) -> None:
    """Train by a recipe. Ctrl-C stops cleanly after the step; the same command goes on exactly there."""
    from minicpm_ref.train import run

    usable_device(device)
    run(recipe, corpus, out or Path("runs") / recipe, tokens, seed, device, sharding)


def read_prompt(prompt: str | None, prompt_file: Path | None, escapes: bool = False) -> str:
    """The text to continue, from whichever option was given, as it is unless `escapes` are asked for."""
    if prompt is not None and prompt_file is not None:
        raise ValueError("--prompt and --prompt-file were both given; expected one")
    if prompt_file is not None:
        return read_text(prompt_file)
    if prompt is None:
        return DEFAULT_PROMPT
    meanings = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda found: meanings[found[1]], prompt) if escapes else prompt


def fit_prompt(tokenizer: Tokenizer, text: str, room: int) -> tuple[list[int], str]:
    """At most `room` ids, the start token among them, of the end of `text`; and the text they stand for."""
    ids = tokenizer.encode(text)
    if len(ids) <= room:
        return ids, text
    start = ids[:1] if tokenizer.add_bos else []
    kept = ids[len(ids) - room + len(start) :]
    Console(stderr=True).print(f"the prompt has {len(ids)} tokens: only the last {len(kept)} are read")
    return [*start, *kept], tokenizer.decode(kept, continues=True)


def main() -> None:
    """Entry point: errors in one line that says what to do, a quiet Ctrl-C."""
    accept_any_text()
    try:
        app()  # exits by itself, also on Ctrl-C
    except (ValueError, RuntimeError, OSError) as error:
        errors = Console(stderr=True)
        show(errors, "error:", style="red")
        show(errors, " " + " ".join(str(error).split("\n")) + "\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
