"""What determines a training run: shape, data, budget, schedule; and what it may start from.

A recipe says everything that a run depends on, so a run is a pure function of it. A variant's recipe subclasses
`Recipe` and overrides what differs: the model it starts from, the batch, the loss, the form that is stored.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicpm_ref.checkpoint import load, variants
from minicpm_ref.config import ModelConfig
from minicpm_ref.data import Corpus
from minicpm_ref.model import MiniCPM
from minicpm_ref.training.card import parent_folder


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a training run. A variant's recipe subclasses this and overrides what differs.

    Lengths and budgets are in tokens. The warmup is counted in tokens too, so that it does not depend on how long the
    run will be: a short decay that branches off a stable run equals a run that was planned that short. `decay` is the
    fraction of the whole run over which the rate falls to zero.

    `parent` names weights to start from, at step 0 with fresh optimizers. `branch` names a run, or "stable", whose
    weights, optimizer state and step this run goes on from, as if it had been planned that way; what lies behind that
    step (data, length, schedule) may be another.
    """

    name: str
    config: ModelConfig
    tokens: int
    context: int = 512
    batch_tokens: int = 4096
    optimizer: str = "muon"
    lr: float = 0.01
    matrix_lr: float = 0.02
    weight_decay: float = 0.05
    warmup_tokens: int = 150_000
    decay: float = 0.3
    clip: float = 1.0
    seed: int = 0
    precision: str = "auto"
    parent: str | None = None
    branch: str | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return max(1, self.tokens // self.batch_tokens)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.loads(json.dumps(fields | {"config": self.config.to_dict()}))

    def build_model(self) -> MiniCPM:
        """The model at step 0: fresh muP weights, or those of the parent. A branch loads its own over it."""
        if self.parent is None:
            return MiniCPM(self.config).init_weights(self.seed)
        return load_parent(self.parent).requires_grad_(True)  # loaded weights ask for none

    def batch(self, corpus: Corpus, step: int, part: int, parts: int) -> tuple[Tensor, ...]:
        """What `loss` needs for one step in process `part` of `parts`: inputs and targets, [rows, context] each."""
        return corpus.batch(step, self.batch_tokens // self.context, self.context, self.seed, part, parts)

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """Mean cross-entropy in nats a token."""
        inputs, targets = batch
        return F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())

    def finished(self, model: MiniCPM) -> MiniCPM:
        """The trained model in the form that is measured and stored."""
        return model


class SavedState(NamedTuple):
    """Content of a `state.safetensors`: `header` (step, seconds, recipe), weights, and each one's optimizer state."""

    header: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]


def read_state(folder: str | Path) -> SavedState:
    """The state that a run in `folder` saved last, in float32 even where the file keeps 16 bits (`weights/stable`).

    Raises FileNotFoundError when there is none.
    """
    path = Path(folder) / "state.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the folder of a training run")
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["training"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open has no __iter__)
    weights = {key.removeprefix("model/"): value.float() for key, value in tensors.items() if key.startswith("model/")}
    optimizer: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, name, entry = key.split("/")
            optimizer.setdefault(name, {})[entry] = value.float()
    return SavedState(header, weights, optimizer)


def load_parent(parent: str) -> MiniCPM:
    """The float32 model that another run starts from: an embedded variant by name, "stable" (the embedded state of the
    base's stable phase), the folder of a model, or that of a run that has not ended."""
    if parent in variants():
        return load(variant=parent)[0]
    folder = parent_folder(parent)
    if (folder / "config.json").is_file():
        return load(folder, dtype=torch.float32)[0]
    state = read_state(folder)
    model = MiniCPM(ModelConfig.from_dict(state.header["recipe"]["config"]))
    model.load_state_dict(state.weights)
    return model
