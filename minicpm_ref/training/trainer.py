"""One trainer for every recipe: muP groups, warmup-stable-decay, exact resume, one process or many.

A run is a pure function of its recipe: the batch of step s is drawn from (seed, s), there is no dropout, and the state
that carries over is the weights and the optimizers. So a run that is killed and resumed gives the same losses as one
that was not, and so do two processes that share each batch.

The schedule is warmup-stable-decay: the rate stays constant until the last part of the run and then falls to zero,
which brings most of the drop in loss. Because nothing before the decay depends on when it begins, a stable run can be
lengthened or cut short at any time: resume it with another number of tokens.

Launch `torchrun --nproc-per-node 2 -m minicpm_ref train ...` for data parallelism; `--sharding fsdp` shards the weights
(FSDP2). Source of the schedule: MiniCPM, arXiv 2404.06395 section 4.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from minicpm_ref.checkpoint import save, sha256_file
from minicpm_ref.data import Corpus, small_sample
from minicpm_ref.evaluate import bits_per_byte
from minicpm_ref.files import replacing, write_text
from minicpm_ref.machine import multiplies_bfloat16
from minicpm_ref.model import MiniCPM
from minicpm_ref.sampling import SamplingParams, generate
from minicpm_ref.tokenizer import Tokenizer
from minicpm_ref.training.card import parent_folder, training_card
from minicpm_ref.training.optimizers import build_optimizers, wsd_factor
from minicpm_ref.training.recipe import Recipe, SavedState, read_state

PROMPTS = (
    "import os\nimport sys\n\n\ndef main():",
    "class Counter:\n    def __init__(self, items):",
    'def read_file(path):\n    """',
)


MOST_SKIPPED = 3  # gradients that are not finite, one after another: the run is lost


def default_precision(device: torch.device) -> str:
    """'bfloat16' where the device multiplies it in hardware, else 'float32'."""
    return "bfloat16" if multiplies_bfloat16(device) else "float32"


def keep_freed_memory() -> None:
    """Ask glibc to keep the memory of freed tensors for the next step; elsewhere this does nothing.

    By default glibc returns every large buffer to the system when it is freed, and the next step pays a page fault for
    each 4 KiB of it again. On a CPU that nearly halves the speed of training a small model. It holds for the whole
    process and cannot be undone, so the command line asks for it and the Trainer, which a notebook may use, does not.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory at the top of the heap that is kept
        mallopt(
            -3, 2**31 - 1
        )  # M_MMAP_THRESHOLD: size from which a buffer is mapped on its own, and unmapped when freed


class Trainer:
    """Runs `recipe` on `corpus`, with everything it writes in `folder`.

    Files: `state.safetensors` (weights, optimizer state, step; replaced atomically), `metrics.jsonl` (one line a step),
    and at the end `model/` in the published layout with `card.json`. An existing state is resumed.
    """

    def __init__(
        self,
        recipe: Recipe,
        corpus: Corpus,
        folder: str | Path,
        device: str | torch.device = "cpu",
        sharding: str = "ddp",
    ):
        if sharding not in ("ddp", "fsdp"):
            raise ValueError(f"sharding {sharding!r}: expected 'ddp' or 'fsdp'")
        self.recipe, self.corpus, self.folder = recipe, corpus, Path(folder)
        self.part, self.parts = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(device)
        saved = read_state(self.folder) if (self.folder / "state.safetensors").exists() else None
        precision = recipe.precision
        if precision == "auto":  # a run goes on as it began, whatever the machine
            began = saved.header.get("precision") if saved is not None else None
            precision = str(began or default_precision(self.device))
        if precision not in ("bfloat16", "float32"):
            raise ValueError(f"precision {precision!r}: expected 'auto', 'bfloat16' or 'float32'")
        self.precision = precision
        if recipe.parent is not None:
            self._check_same_vocabulary(recipe.parent)
        if self.parts > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.model: nn.Module = self._build_model().to(self.device, torch.float32)
        if self.parts > 1 and sharding == "fsdp":
            if recipe.optimizer == "muon":
                raise ValueError(
                    "optimizer 'muon' needs whole gradient matrices: use --sharding ddp, or optimizer 'adamw' with fsdp"
                )
            self._shard()
        elif self.parts > 1:
            self.model = nn.parallel.DistributedDataParallel(self.model)
        self.optimizers = self._build_optimizers()
        self.step = 0
        self.seconds = 0.0
        self.skipped = 0  # steps in a row whose gradient was not finite
        self._stop = False
        if saved is not None:
            self._check_same_run(saved.header)
            self._take(saved)
            self.seconds = saved.header["seconds"]
        elif recipe.branch is not None:
            self._take(read_state(parent_folder(recipe.branch)))

    def _build_model(self) -> nn.Module:
        return self.recipe.build_model()

    def _build_optimizers(self) -> list[torch.optim.Optimizer]:
        recipe = self.recipe
        return build_optimizers(
            self.model,
            recipe.config,
            recipe.optimizer,
            recipe.lr,
            recipe.matrix_lr,
            recipe.weight_decay,
            getattr(torch, self.precision),
        )

    def _check_same_vocabulary(self, parent: str) -> None:
        """Under another vocabulary the parent's embedding means nothing, and training would not say so."""
        folder = parent_folder(parent)
        path = folder / "tokenizer.json"
        if path.is_file() and path.read_bytes() != (self.corpus.folder / "tokenizer.json").read_bytes():
            raise ValueError(
                f"{self.corpus.folder}: its tokenizer.json is not that of {parent!r}; "
                "build the corpus with `minicpm-ref data --reuse-tokenizer`"
            )

    def _shard(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.parts,))
        assert isinstance(self.model, MiniCPM)
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns its metrics, equal on every process."""
        recipe = self.recipe
        factor = wsd_factor(
            self.step, recipe.steps, recipe.warmup_tokens // recipe.batch_tokens, int(recipe.decay * recipe.steps)
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
        batch = [t.to(self.device) for t in recipe.batch(self.corpus, self.step, self.part, self.parts)]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            loss = recipe.loss(self.model, *batch)
        mean_loss = loss.detach().clone()
        if self.parts > 1:  # before anyone may stop: a process that leaves alone would hang the others
            dist.all_reduce(mean_loss)
            mean_loss /= self.parts
        if not torch.isfinite(mean_loss):
            raise RuntimeError(
                f"step {self.step}: the loss is {mean_loss.item()}; the last good state is in {self.folder}"
            )
        loss.backward()
        clipped = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        norm = float(clipped.full_tensor() if hasattr(clipped, "full_tensor") else clipped)
        # a gradient that overflowed says nothing about the way down: weights and moments stay as they are
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        for optimizer in self.optimizers:
            if not self.skipped:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.skipped == MOST_SKIPPED:
            raise RuntimeError(
                f"step {self.step}: the gradient's norm is {norm}, as in the {MOST_SKIPPED - 1} steps before; "
                f"the last good state is in {self.folder}"
            )
        self.step += 1
        row = {"step": self.step, "loss": mean_loss.item(), "grad_norm": norm, "lr_factor": factor}
        return row | {"skipped": self.skipped} if self.skipped else row

    def run(
        self,
        checkpoint_seconds: float = 120,
        evaluate_steps: int = 250,
        console: Console | None = None,
        stop_at: int | None = None,
    ) -> dict[str, Any] | None:
        """Train to the end of the recipe and return the card; None when stopped early by Ctrl-C or at step `stop_at`.

        Ctrl-C finishes the step, saves the state and returns; the same call later continues exactly there. Raises
        RuntimeError when another run writes into the folder.
        """
        with self._only_run_here():
            return self._run(checkpoint_seconds, evaluate_steps, console or Console(quiet=self.part > 0), stop_at)

    def _run(
        self, checkpoint_seconds: float, evaluate_steps: int, console: Console, stop_at: int | None
    ) -> dict[str, Any] | None:
        self._stop = False
        metrics = self.folder / "metrics.jsonl"
        self._truncate_metrics(metrics)
        previous = signal.signal(signal.SIGINT, self._request_stop) if self._in_main_thread() else None
        last_save = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        try:
            with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
                task = progress.add_task(self.recipe.name, total=self.recipe.steps, completed=self.step)
                stop, last = False, min(self.recipe.steps, stop_at or self.recipe.steps)
                while self.step < last and not stop:
                    begin = time.monotonic()
                    row = self.train_step()
                    self.seconds += time.monotonic() - begin
                    row |= {"tokens": self.step * self.recipe.batch_tokens, "seconds": round(self.seconds, 2)}
                    if self.step % evaluate_steps == 0 or self.step == self.recipe.steps:
                        row |= self._evaluate(console)
                    self._log(metrics, row)
                    progress.update(
                        task, completed=self.step, description=f"{self.recipe.name}  loss {row['loss']:.3f}"
                    )
                    if self.step % 50 == 0:
                        shown = " ".join(f"{key} {value:.4g}" for key, value in row.items())
                        console.log(shown) if not console.is_terminal else None
                    stop, due = self._agreed(self._stop, time.monotonic() - last_save > checkpoint_seconds)
                    if due:
                        self.save_state()
                        last_save = time.monotonic()
            self.save_state()
        finally:
            if previous is not None:
                signal.signal(signal.SIGINT, previous)
        if self.step < self.recipe.steps:
            console.print(f"stopped at step {self.step} of {self.recipe.steps}; run the same command to go on")
            return None
        return self._finish(console)

    @staticmethod
    def _in_main_thread() -> bool:
        import threading

        return threading.current_thread() is threading.main_thread()

    def _request_stop(self, *_: object) -> None:
        self._stop = True

    def _agreed(self, *wishes: bool) -> list[bool]:
        """What any process wishes, known to all: saving needs every one of them, and clocks and signals differ."""
        if self.parts == 1:
            return list(wishes)
        votes = torch.tensor(wishes, dtype=torch.int32, device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes.tolist()]

    @contextmanager
    def _only_run_here(self) -> Iterator[None]:
        """Hold the folder: two runs in it would each overwrite the other's state."""
        if self.part > 0:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self.folder / ".lock", timeout=0).acquire()
        except Timeout:
            raise RuntimeError(
                f"{self.folder}: another run is writing into this folder; wait, or use another"
            ) from None
        with lock:
            yield

    def _log(self, path: Path, row: dict[str, float]) -> None:
        if self.part == 0:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _truncate_metrics(self, path: Path) -> None:
        """Drop the lines of steps that the resumed state has not seen."""
        if self.part == 0:
            text = path.read_text("utf-8") if path.exists() else ""
            lines = text.split("\n")[:-1]  # what has no line feed yet is a line that a crash cut off
            kept = [line for line in lines if json.loads(line)["step"] <= self.step]
            write_text(path, "".join(line + "\n" for line in kept))

    # ---- state -------------------------------------------------------------------------------------------------------

    def save_state(self) -> None:
        """Write weights, optimizer state and step to `state.safetensors`, atomically."""
        weights, optimizer = get_state_dict(
            self.model, self.optimizers, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if self.part > 0:
            return
        tensors: dict[str, Any] = {f"model/{name}": tensor for name, tensor in weights.items()}
        states: Any = optimizer["state"]
        for name, state in states.items():
            tensors |= {f"optimizer/{name}/{key}": value for key, value in state.items()}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        header = {
            "step": self.step,
            "seconds": self.seconds,
            "recipe": self.recipe.to_dict(),
            "precision": self.precision,
            "corpus_manifest_sha256": self.corpus.manifest_sha256,
        }
        with replacing(self.folder / "state.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"training": json.dumps(header)})

    def _take(self, saved: SavedState) -> None:
        """Go on from weights, optimizer state and step of a saved run."""
        options = StateDictOptions(full_state_dict=True)
        _, fresh = get_state_dict(self.model, self.optimizers, options=options)
        optimizer: Any = {"state": saved.optimizer, "param_groups": fresh["param_groups"]}
        set_state_dict(
            self.model,
            self.optimizers,
            model_state_dict=dict(saved.weights),
            optim_state_dict=optimizer,
            options=options,
        )
        self.step = saved.header["step"]

    def _check_same_run(self, header: dict[str, Any]) -> None:
        """Raise ValueError when the state in the folder was made with other settings, on other data or otherwise
        rounded: the curve would go on, and the card would tell of one run where there were two."""
        path, saved, current = self.folder / "state.safetensors", header["recipe"], self.recipe.to_dict()
        changed = [key for key in current if key != "tokens" and current[key] != saved.get(key)]
        for key, value in (("precision", self.precision), ("corpus_manifest_sha256", self.corpus.manifest_sha256)):
            if key in header and header[key] != value:
                raise ValueError(
                    f"{path}: {key} was {header[key]!r}, now {value!r}; use an empty folder, or the same "
                    + ("corpus" if key.startswith("corpus") else "recipe with that precision")
                )
        if changed:
            listed = ", ".join(f"{key} = {current[key]!r} (was {saved.get(key)!r})" for key in changed)
            raise ValueError(f"{path} belongs to another recipe: {listed}; use an empty folder, or the same settings")

    # ---- measuring ---------------------------------------------------------------------------------------------------

    def whole_model(self) -> MiniCPM:
        """The bare model, gathered from its shards when there are several."""
        if self.parts == 1:
            assert isinstance(self.model, MiniCPM)
            return self.model
        weights, _ = get_state_dict(self.model, [], options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        model = MiniCPM(self.recipe.config)
        if self.part == 0:
            model.load_state_dict(weights)
        return model

    def _evaluate(self, console: Console) -> dict[str, float]:
        """Held-out bits per byte on a small fixed sample, and a completion to look at."""
        model = self.whole_model()
        if self.part > 0:
            return {}
        texts = [document.text for document in small_sample(self.corpus.held_out, 60_000)]
        result = {"held_out": bits_per_byte(model, self.corpus.tokenizer, texts, self.recipe.context)}
        prompt = PROMPTS[self.step // 250 % len(PROMPTS)]
        console.print(f"[dim]{complete(model, self.corpus.tokenizer, prompt)}[/dim]", highlight=False)
        return result

    def _finish(self, console: Console) -> dict[str, Any] | None:
        model = self.whole_model()
        if self.part > 0:
            return None
        model = self.recipe.finished(model)
        console.print("measuring held-out bits per byte by file group")
        metrics = (self.folder / "metrics.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in metrics]
        card = training_card(self.recipe, self.corpus, model, rows, self.device, self.precision, self.seconds)
        save(model, self.folder / "model", self.corpus.tokenizer, dtype=torch.float16)
        card["weights_sha256"] = sha256_file(self.folder / "model" / "model.safetensors")
        write_text(self.folder / "model" / "card.json", json.dumps(card, indent=1))
        console.print(f"bits per byte: {card['held_out_bits_per_byte']}")
        return card


def complete(model: MiniCPM, tokenizer: Tokenizer, prompt: str, tokens: int = 60) -> str:
    """`prompt` and a seeded completion of it, as long as the model's context allows."""
    ids = torch.tensor([tokenizer.encode(prompt)], device=model.device)
    tokens = min(tokens, model.config.max_position_embeddings - ids.shape[1])
    if tokens < 1:
        return prompt
    params = SamplingParams(temperature=0.6, top_k=40, seed=0)
    return prompt + tokenizer.decode(list(generate(model, ids, tokens, params, stop_ids=tokenizer.eos_ids)))
