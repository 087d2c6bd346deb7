"""What a task of the wind tunnel does: train one candidate, or one stable run with a decay from several of its points.

A WSD run is constant until its decay, so the stable part of a long run *is* the stable part of every shorter one. A
copy of its state at some point, resumed under a shorter plan, decays from there: a loss at each data size for the price
of one run and some short decays, instead of a run a size. That a branch equals the run that was planned that short is
exact, because the batch of a step depends on (seed, step) alone and the warmup is counted in tokens.

Only the end of a decay is a point (tokens, loss) of a scaling law: points along the stable part of one curve lie above
it and hang together. Source: MiniCPM, arXiv 2404.06395 section 4 (WSD) and 4.5 (branches for data scaling).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minicpm_ref.checkpoint import save
from minicpm_ref.data import Corpus, small_sample
from minicpm_ref.evaluate import bits_per_byte
from minicpm_ref.files import write_text
from minicpm_ref.model import MiniCPM
from minicpm_ref.training import Trainer
from minicpm_ref.wind_tunnel.candidate import Candidate, multiplied_parameters
from minicpm_ref.wind_tunnel.tasks import Stopped, stop_requested

SAVE_EVERY = 60.0  # seconds


def open_corpus(settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> Corpus:
    """The corpus at inputs["corpus"]. Raises ValueError when it is not the one that the settings name."""
    corpus = Corpus(inputs["corpus"])
    if corpus.manifest_sha256 != settings["corpus_manifest_sha256"]:
        raise ValueError(
            f"{corpus.folder}: manifest {corpus.manifest_sha256[:16]}, the settings say "
            f"{settings['corpus_manifest_sha256'][:16]}; build the corpus that the sweep was planned for"
        )
    return corpus


def train_until(trainer: Trainer, step: int) -> None:
    """Train up to `step`, saving the state every minute, at the end, and when asked to stop (raises `Stopped`)."""
    last = time.monotonic()
    # of several processes only the first one writes; all of them train and save together
    path = trainer.folder / ("losses.jsonl" if trainer.part == 0 else f".losses.{trainer.part}")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text("utf-8").splitlines()[: trainer.step] if path.exists() else []
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
        while trainer.step < step:
            row = trainer.train_step()
            file.write(json.dumps({"step": row["step"], "loss": row["loss"]}) + "\n")
            if stop_requested():
                trainer.save_state()
                raise Stopped
            if time.monotonic() - last > SAVE_EVERY:
                file.flush()
                trainer.save_state()
                last = time.monotonic()
    trainer.save_state()


def measure(model: MiniCPM, corpus: Corpus, candidate: Candidate) -> float:
    """Held-out bits per byte on the fixed sample of `evaluation_bytes` bytes, in windows of the run's context."""
    texts = [document.text for document in small_sample(corpus.held_out, candidate.evaluation_bytes)]
    return round(bits_per_byte(model, corpus.tokenizer, texts, candidate.context), 5)


def tail_loss(folder: Path, steps: int) -> float:
    """Mean training loss, in nats a token, of the last tenth of `steps` steps."""
    losses = [json.loads(line)["loss"] for line in (folder / "losses.jsonl").read_text("utf-8").splitlines()]
    tail = losses[-max(1, steps // 10) :]
    return round(sum(tail) / len(tail), 5)


def describe(candidate: Candidate, corpus: Corpus) -> dict[str, Any]:
    """Sizes that every record carries."""
    config = candidate.config(corpus.tokenizer.vocab_size)
    return {"parameters": config.num_parameters(), "multiplied_parameters": multiplied_parameters(config)}


def train_candidate(settings: Mapping[str, Any], folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Task: train `Candidate.from_settings(settings)` to its end and measure it."""
    corpus, candidate = open_corpus(settings, inputs), Candidate.from_settings(settings)
    recipe = candidate.recipe(corpus.tokenizer.vocab_size)
    trainer = Trainer(recipe, corpus, folder)
    train_until(trainer, recipe.steps)
    result = describe(candidate, corpus) | {
        "tokens": recipe.steps * recipe.batch_tokens,
        "train_loss": tail_loss(folder, recipe.steps),
        "held_out_bits_per_byte": measure(trainer.whole_model(), corpus, candidate),
    }
    (folder / "state.safetensors").unlink()  # the largest file by far, and nothing goes on from the end of a decay
    return result


def train_branches(settings: Mapping[str, Any], folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Task: one stable run, and a decay from each of `stable_steps` that takes the share `decay` of the whole branch.

    The result lists the ends of the branches; each leaves its weights in `branch_<step>/model`.
    """
    corpus, candidate = open_corpus(settings, inputs), Candidate.from_settings(settings)
    stable_steps: list[int] = sorted(settings["stable_steps"])
    plans = {step: branch_plan(candidate, step) for step in stable_steps}
    longest = replace(candidate, tokens=plans[stable_steps[-1]])
    stable = Trainer(longest.recipe(corpus.tokenizer.vocab_size), corpus, folder / "stable")
    ends: list[dict[str, Any]] = []
    files: list[str] = []
    for step in stable_steps:
        branch = folder / f"branch_{step}"
        done = branch / "end.json"
        if not done.is_file():
            train_until(stable, step)
            branch.mkdir(exist_ok=True)
            if not (branch / "state.safetensors").is_file():
                shutil.copyfile(folder / "stable" / "state.safetensors", branch / ".state.tmp")
                (branch / ".state.tmp").rename(branch / "state.safetensors")
            recipe = replace(candidate, tokens=plans[step]).recipe(corpus.tokenizer.vocab_size)
            decay = Trainer(recipe, corpus, branch)
            train_until(decay, recipe.steps)
            save(decay.whole_model(), branch / "model", corpus.tokenizer, dtype=torch.float16)
            end = {
                "stable_tokens": step * candidate.batch_tokens,
                "tokens": recipe.steps * recipe.batch_tokens,
                "train_loss": tail_loss(branch, recipe.steps - step),
                "held_out_bits_per_byte": measure(decay.whole_model(), corpus, candidate),
            }
            (branch / "state.safetensors").unlink()
            write_text(done, json.dumps(end))
        ends.append(json.loads(done.read_text("utf-8")))
        files += [f"{branch.name}/model/{name}" for name in ("model.safetensors", "config.json")]
    return describe(candidate, corpus) | {"branches": ends, "files": files}


def branch_plan(candidate: Candidate, stable_step: int) -> int:
    """Tokens of the run whose decay of share `candidate.decay` begins at `stable_step`.

    Raises ValueError when no whole number of steps gives exactly that.
    """
    steps = round(stable_step / (1 - candidate.decay))
    if steps - int(candidate.decay * steps) != stable_step:
        raise ValueError(
            f"stable step {stable_step} with decay = {candidate.decay}: no run of whole steps begins its decay there; "
            f"the run of {steps} steps begins it at {steps - int(candidate.decay * steps)}"
        )
    return steps * candidate.batch_tokens
