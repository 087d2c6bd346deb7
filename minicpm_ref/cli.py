"""The command line: `minicpm-ref tour | generate | chat | serve | eval | info | data | train | clean`.

Each command is a thin layer over one public function, so that whatever is shown here can be done in a few lines of
Python.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from minicpm_ref.config import PRESETS, ModelConfig
from minicpm_ref.files import read_text
from minicpm_ref.machine import usable_device
from minicpm_ref.terminal import accept_any_text, show
from minicpm_ref.tokenizer import Tokenizer
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
    from minicpm_ref.engine import Engine
    from minicpm_ref.sampling import SamplingParams

    text = read_prompt(prompt, prompt_file, escapes)
    SamplingParams(temperature, top_k, top_p)  # a wrong number is named before anything is loaded
    engine = Engine(weights, device=device, variant=variant, progress=report)
    room = engine.max_length - min(max_new_tokens, engine.max_length // 2)  # for the prompt
    if chat:
        ids = engine.tokenizer.apply_chat_template([{"role": "user", "content": text}], enable_thinking=think)
        if len(ids) > room:
            raise ValueError(f"the conversation has {len(ids)} tokens: expected at most {room} of {engine.max_length}")
    else:
        ids, text = fit_prompt(engine.tokenizer, text, room)
        show(console, text)
    for piece in engine.generate(ids, max_new_tokens, temperature, top_k, top_p, seed=seed, stream=True):
        show(console, piece)
    console.print()


def report(line: str) -> None:
    """Say what is going on, beside the output proper."""
    show(Console(stderr=True), line + "\n", "dim")


Batch = Annotated[int, typer.Option(min=1, help="Requests that run at the same time.")]
MaxLength = Annotated[int | None, typer.Option(min=2, help="Tokens of a conversation. Default: the model's.")]
Format = Annotated[
    str, typer.Option(help="Of the weights: auto, float32, bfloat16, int8, int4, ternary.")
]
ExecutorName = Annotated[str, typer.Option(help="Who computes: auto, torch, or compiled (numba, on a CPU).")]


@app.command()
def chat(
    weights: Source = None,
    variant: Annotated[str, typer.Option(help="Which of the embedded weights.")] = "base",
    device: Device = "cpu",
    number_format: Format = "auto",
    executor: ExecutorName = "auto",
    max_length: MaxLength = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens that reach this probability.")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    system: Annotated[str | None, typer.Option(help="An instruction in front of the conversation.")] = None,
) -> None:
    """Talk with a model: several turns, streamed. /reset forgets, /think and /no_think switch, Ctrl-C stops an answer,
    Ctrl-D leaves."""
    from minicpm_ref.engine import Engine
    from minicpm_ref.engine.chat import Chat, run_chat
    from minicpm_ref.sampling import SamplingParams

    params = SamplingParams(temperature, top_p=top_p, seed=seed)
    engine = Engine(
        weights,
        weights=number_format,
        device=device,
        variant=variant,
        executor=executor,
        max_length=max_length,
        progress=report,
    )

    def screen(text: str, dim: bool = False) -> None:
        show(console, text, "dim" if dim else None)

    run_chat(Chat(engine, params, max_new_tokens, system), screen)


@app.command()
def serve(
    weights: Source = None,
    variant: Annotated[str, typer.Option(help="Which of the embedded weights.")] = "base",
    device: Device = "cpu",
    number_format: Format = "auto",
    executor: ExecutorName = "auto",
    max_length: MaxLength = None,
    batch: Batch = 4,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are refused with 429.")] = 16,
    host: Annotated[str, typer.Option(help="Address to listen on. The default is this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    name: Annotated[str, typer.Option(help="The model's name in requests and answers.")] = "minicpm-ref",
    api_key: Annotated[
        str | None, typer.Option(envvar="MINICPM_API_KEY", help="Clients must send it. Default: none is asked for.")
    ] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Largest request in bytes.")] = 2**20,
) -> None:
    """Serve OpenAI's interface (/v1/chat/completions, /v1/completions, /v1/models) and a chat page, until Ctrl-C."""
    from minicpm_ref.engine import Engine

    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise RuntimeError("serve needs fastapi and uvicorn: pip install 'minicpm_ref[serve]'")
    from minicpm_ref.engine.server import create_app, serve

    engine = Engine(
        weights,
        weights=number_format,
        device=device,
        variant=variant,
        executor=executor,
        max_length=max_length,
        batch=batch,
        progress=report,
    )
    console.print(f"chat page: http://{host}:{port}/   interface: http://{host}:{port}/v1", highlight=False)
    serve(create_app(engine, name, queue, api_key, max_body), host, port)


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
