"""The trainer: optimizers, schedule, exact resume after a kill, and the same losses on two processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minicpm_ref.checkpoint import load
from minicpm_ref.config import ModelConfig
from minicpm_ref.data import Corpus
from minicpm_ref.model import MiniCPM
from minicpm_ref.training import Recipe, Trainer
from minicpm_ref.training import trainer as trainer_module
from minicpm_ref.training.optimizers import Muon, build_optimizers, orthogonalize, wsd_factor
from minicpm_ref.training.recipes import get_recipe, recipe_names

CONFIG = ModelConfig(480, 64, 2, 4, 1, 96, max_position_embeddings=256)
RECIPE = Recipe("tiny", CONFIG, tokens=24 * 128, context=32, batch_tokens=128, warmup_tokens=128, precision="float32")


def losses(trainer: Trainer, steps: int) -> list[float]:
    return [trainer.train_step()["loss"] for _ in range(steps)]


# ---- optimizers and schedule


def test_wsd_warms_up_stays_and_decays() -> None:
    factors = [wsd_factor(step, 100, 10, 20) for step in range(100)]
    assert factors[0] == 0.1
    assert factors[9:80] == [1.0] * 71
    assert factors[80] == 1.0
    assert factors[90] == 0.5
    assert factors[99] == 0.05
    assert all(a >= b for a, b in zip(factors[80:], factors[81:], strict=False))


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8), (3, 5, 7)])
def test_orthogonalize_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrix)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.3
    assert values.max() < 1.3
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    assert ((u @ vt) * result).sum() > 0.8 * min(shape[-2:]) * (shape[0] if len(shape) == 3 else 1)


@pytest.mark.parametrize("shape", [(256, 256), (64, 768), (768, 256)])
def test_orthogonalizing_in_bfloat16_errs_by_its_rounding(shape: tuple[int, ...]) -> None:
    """Five iterations of three products, each rounded to 2^-9 of itself; the polynomial can enlarge an error by 3.4."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact, rounded = orthogonalize(matrix), orthogonalize(matrix, dtype=torch.bfloat16)
    bound = 5 * 3 * 3.4 * 2**-9
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < bound * exact.norm()
    assert (orthogonalize(matrix, iterations=1) - exact).norm() > bound * exact.norm()


def test_muon_stacks_equal_shapes_without_mixing_them() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(6, 4, generator=generator) for _ in range(3)]
    gradients = [torch.randn(6, 4, generator=generator) for _ in range(3)]
    together = [torch.nn.Parameter(w.clone()) for w in weights]
    alone = [torch.nn.Parameter(w.clone()) for w in weights]
    for group in (together, alone):
        for parameter, gradient in zip(group, gradients, strict=True):
            parameter.grad = gradient.clone()
    Muon(together, lr=0.1).step()
    for parameter in alone:
        Muon([parameter], lr=0.1).step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_mup_groups_divide_the_rate_of_layer_matrices_by_the_width_ratio() -> None:
    wide = replace(CONFIG, hidden_size=512, num_attention_heads=8, num_key_value_heads=2)
    with torch.device("meta"):
        model = MiniCPM(wide)
    (adamw,) = build_optimizers(model, wide, "adamw", lr=0.01, matrix_lr=0.02, weight_decay=0.1)
    rates = {id(p): group["base_lr"] for group in adamw.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = 0.01 / 2 if parameter.ndim == 2 and ".layers." in name else 0.01
        assert rates[id(parameter)] == expected, name
    muon, adamw = build_optimizers(model, wide, "muon", lr=0.01, matrix_lr=0.02, weight_decay=0.1)
    assert len(muon.param_groups[0]["params"]) == 14
    with pytest.raises(ValueError, match="'sgd'"):
        build_optimizers(model, wide, "sgd", 0.01, 0.02, 0.1)


# ---- the trainer


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_training_learns(corpus: Corpus, tmp_path, optimizer: str) -> None:
    curve = losses(Trainer(replace(RECIPE, optimizer=optimizer), corpus, tmp_path), RECIPE.steps)
    assert curve[0] > 5.5
    assert sum(curve[-4:]) / 4 < curve[0] - 2


def test_resuming_is_exact_even_with_a_later_end(corpus: Corpus, tmp_path) -> None:
    expected = losses(Trainer(RECIPE, corpus, tmp_path / "whole"), 12)
    first = Trainer(RECIPE, corpus, tmp_path / "parts")
    start = losses(first, 5)
    first.save_state()
    second = Trainer(replace(RECIPE, tokens=2 * RECIPE.tokens), corpus, tmp_path / "parts")  # a longer stable phase
    assert second.step == 5
    assert start + losses(second, 7) == expected


def test_another_recipe_in_the_folder_is_refused(corpus: Corpus, tmp_path) -> None:
    Trainer(RECIPE, corpus, tmp_path).save_state()
    with pytest.raises(ValueError, match=r"lr = 0.5 \(was 0.01\)"):
        Trainer(replace(RECIPE, lr=0.5), corpus, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(corpus: Corpus, tmp_path) -> None:
    trainer = Trainer(RECIPE, corpus, tmp_path)
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = float("nan")
    with pytest.raises(RuntimeError, match="loss is nan"):
        trainer.train_step()


def test_a_finished_run_leaves_weights_and_a_card(corpus: Corpus, tmp_path) -> None:
    card = Trainer(RECIPE, corpus, tmp_path).run(evaluate_steps=10)
    assert card is not None
    model, tokenizer = load(tmp_path / "model")
    assert model.dtype == torch.float16
    assert tokenizer is not None
    assert json.loads((tmp_path / "model" / "card.json").read_text()) == card
    assert card["tokens"] == RECIPE.tokens
    assert card["corpus"]["manifest_sha256"] == corpus.manifest_sha256
    assert card["held_out_bits_per_byte"]["all"] < 2
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, RECIPE.steps + 1))
    assert [row["step"] for row in rows if "held_out" in row] == [10, 20, 24]


WORKER = """
import sys
from dataclasses import replace
sys.path.insert(0, {folder!r})
from test_trainer import RECIPE
from minicpm_ref.data import Corpus
from minicpm_ref.training import Trainer
recipe = replace(RECIPE, optimizer=sys.argv[3], tokens=int(sys.argv[5]) * RECIPE.batch_tokens)
trainer = Trainer(recipe, Corpus(sys.argv[1]), sys.argv[2], sharding=sys.argv[4])
trainer.run(checkpoint_seconds=0)
"""


def worker(tmp_path: Path, corpus: Corpus, *arguments: str) -> list[str]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(folder=str(Path(__file__).parent)))
    return [str(script), str(corpus.folder), str(tmp_path / "run"), *arguments]


def read_losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(corpus: Corpus, tmp_path) -> None:
    command = [sys.executable, *worker(tmp_path, corpus, "muon", "ddp", "60")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 8):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    recipe = replace(RECIPE, tokens=60 * RECIPE.batch_tokens)
    assert read_losses(tmp_path / "run") == losses(Trainer(recipe, corpus, tmp_path / "whole"), 60)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "sharding"), [("muon", "ddp"), ("adamw", "ddp"), ("adamw", "fsdp")])
def test_two_processes_give_the_losses_of_one(corpus: Corpus, tmp_path, optimizer: str, sharding: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*command, *worker(tmp_path, corpus, optimizer, sharding, "8")], check=True, env=os.environ)
    recipe = replace(RECIPE, optimizer=optimizer, tokens=8 * RECIPE.batch_tokens)
    alone = losses(Trainer(recipe, corpus, tmp_path / "alone"), 8)
    assert read_losses(tmp_path / "run") == pytest.approx(alone, abs=2e-4)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_settings_that_make_no_sense_are_refused(corpus: Corpus, tmp_path) -> None:
    with pytest.raises(ValueError, match="sharding 'zero'"):
        Trainer(RECIPE, corpus, tmp_path, sharding="zero")
    with pytest.raises(ValueError, match="precision 'int8'"):
        Trainer(replace(RECIPE, precision="int8"), corpus, tmp_path)
    with pytest.raises(ValueError, match="'bass'.*base"):
        get_recipe("bass")


def test_every_recipe_can_be_read() -> None:
    assert "base" in recipe_names()
    for name in recipe_names():
        assert get_recipe(name).name == name


# ---- one run in a folder, one story on its card


def test_stopping_and_going_on_with_one_trainer(corpus: Corpus, tmp_path) -> None:
    trainer = Trainer(RECIPE, corpus, tmp_path)
    trainer._request_stop()  # a Ctrl-C that came before the call: the call is a new wish
    assert trainer.run(evaluate_steps=100) is not None
    assert len(read_losses(tmp_path)) == RECIPE.steps


def test_ctrl_c_saves_and_the_same_trainer_goes_on(corpus: Corpus, tmp_path, monkeypatch) -> None:
    trainer = Trainer(RECIPE, corpus, tmp_path / "stopped")
    step = trainer.train_step

    def interrupted() -> dict[str, float]:
        if trainer.step == 4:
            trainer._request_stop()
        return step()

    monkeypatch.setattr(trainer, "train_step", interrupted)
    assert trainer.run(evaluate_steps=100) is None
    assert len(read_losses(tmp_path / "stopped")) == 5
    monkeypatch.setattr(trainer, "train_step", step)
    assert trainer.run(evaluate_steps=100) is not None
    assert read_losses(tmp_path / "stopped") == losses(Trainer(RECIPE, corpus, tmp_path / "whole"), RECIPE.steps)


def test_a_line_that_a_crash_cut_off_is_dropped(corpus: Corpus, tmp_path) -> None:
    Trainer(RECIPE, corpus, tmp_path).run(evaluate_steps=100, stop_at=3)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    Trainer(RECIPE, corpus, tmp_path).run(evaluate_steps=100, stop_at=6)
    assert len(read_losses(tmp_path)) == 6


def test_another_corpus_or_precision_is_not_resumed_without_a_word(corpus: Corpus, tmp_path) -> None:
    Trainer(RECIPE, corpus, tmp_path / "run").save_state()
    with pytest.raises(ValueError, match="precision was 'float32', now 'bfloat16'"):
        Trainer(replace(RECIPE, precision="bfloat16"), corpus, tmp_path / "run")
    shutil.copytree(corpus.folder, tmp_path / "corpus")
    manifest = tmp_path / "corpus" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(ValueError, match="corpus_manifest_sha256 was"):
        Trainer(RECIPE, Corpus(tmp_path / "corpus"), tmp_path / "run")


def test_auto_goes_on_in_the_precision_that_it_began_with(corpus: Corpus, tmp_path, monkeypatch) -> None:
    recipe = replace(RECIPE, precision="auto")
    for began in ("float32", "bfloat16"):
        monkeypatch.setattr(trainer_module, "default_precision", lambda device, began=began: began)
        Trainer(recipe, corpus, tmp_path / began).save_state()
        monkeypatch.setattr(trainer_module, "default_precision", lambda device: "neither")
        assert Trainer(recipe, corpus, tmp_path / began).precision == began


def test_two_runs_in_one_folder_are_refused(corpus: Corpus, tmp_path) -> None:
    first, second = Trainer(RECIPE, corpus, tmp_path), Trainer(RECIPE, corpus, tmp_path)
    with first._only_run_here(), pytest.raises(RuntimeError, match="another run is writing into this folder"):
        second.run()
    assert second.run(evaluate_steps=100, stop_at=2) is None  # once the first has ended


def test_a_branch_equals_a_run_that_was_planned_that_way(corpus: Corpus, tmp_path) -> None:
    """Warmup is counted in tokens and data is drawn by step, so what was longer does not show."""
    planned = replace(RECIPE, warmup_tokens=4 * 128, decay=0.5)
    longer = replace(planned, tokens=100 * 128)
    expected = losses(Trainer(planned, corpus, tmp_path / "planned"), RECIPE.steps)
    stable = Trainer(longer, corpus, tmp_path / "stable")
    begun = losses(stable, 10)
    stable.save_state()
    branch = Trainer(replace(planned, branch=str(tmp_path / "stable")), corpus, tmp_path / "branch")
    assert begun + losses(branch, RECIPE.steps - 10) == expected
    card = Trainer(replace(planned, branch=str(tmp_path / "stable")), corpus, tmp_path / "run").run(evaluate_steps=100)
    assert card is not None
    assert card["recipe"]["branch"] == str(tmp_path / "stable")


@pytest.mark.parametrize("resume", [0, 3, 4, 12, 23])
def test_the_rate_is_a_function_of_the_step_alone(corpus: Corpus, tmp_path, resume: int) -> None:
    """Every group moves by the same factor, through warmup, plateau, decay and a resume at each edge."""
    recipe = replace(RECIPE, warmup_tokens=4 * 128, decay=0.5)

    def rates(trainer: Trainer, steps: int) -> list[list[float]]:
        found = []
        for _ in range(steps):
            factor = trainer.train_step()["lr_factor"]
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            assert all(group["lr"] == group["base_lr"] * factor for group in groups)
            found.append([group["lr"] for group in groups])
        return found

    first = Trainer(recipe, corpus, tmp_path)
    before = rates(first, resume)
    first.save_state()
    after = rates(Trainer(recipe, corpus, tmp_path), RECIPE.steps - resume)
    expected = [wsd_factor(step, 24, 4, 12) for step in range(24)]
    bases = [group["base_lr"] for optimizer in first.optimizers for group in optimizer.param_groups]
    assert before + after == [[base * factor for base in bases] for factor in expected]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e20])
def test_a_gradient_that_is_not_finite_moves_nothing(corpus: Corpus, tmp_path, value: float) -> None:
    trainer = Trainer(RECIPE, corpus, tmp_path)
    losses(trainer, 2)
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    moments = [t.clone() for o in trainer.optimizers for s in o.state.values() for t in s.values()]
    bad = trainer.model.model.layers[0].mlp.up_proj.weight
    hook = bad.register_hook(lambda gradient: torch.full_like(gradient, value))
    row = trainer.train_step()
    assert row["skipped"] == 1
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trainer.model.state_dict().items())
    now = [t for o in trainer.optimizers for s in o.state.values() for t in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, now, strict=True))
    trainer.train_step()
    with pytest.raises(RuntimeError, match="the gradient's norm is .*, as in the 2 steps before"):
        trainer.train_step()
    hook.remove()


def test_one_bad_gradient_is_forgotten_after_a_good_one(corpus: Corpus, tmp_path) -> None:
    trainer = Trainer(RECIPE, corpus, tmp_path)
    bad = trainer.model.model.layers[0].mlp.up_proj.weight
    for _ in range(4):
        hook = bad.register_hook(lambda gradient: gradient * float("inf"))
        assert trainer.train_step()["skipped"] == 1
        hook.remove()
        assert "skipped" not in trainer.train_step()


# ---- settings that a curve does not show


def test_large_gradients_are_clipped(corpus: Corpus, tmp_path) -> None:
    """After a step the gradients that the optimizer saw have norm `clip`, though the loss asked for more."""
    seen: list[float] = []
    trainer = Trainer(replace(RECIPE, clip=1e-3), corpus, tmp_path)

    def note(*_: object) -> None:
        squares = [p.grad.square().sum() for p in trainer.model.parameters() if p.grad is not None]
        seen.append(float(torch.stack(squares).sum().sqrt()))

    trainer.optimizers[0].register_step_pre_hook(note)
    assert trainer.train_step()["grad_norm"] > 0.1
    assert seen[0] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_only_layer_matrices_decay(optimizer: str) -> None:
    model = MiniCPM(CONFIG).init_weights()
    optimizers = build_optimizers(model, CONFIG, optimizer, lr=0.01, matrix_lr=0.02, weight_decay=0.1)
    decay = {id(p): g["weight_decay"] for o in optimizers for g in o.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        hidden = 0.1 if optimizer == "muon" else 0.1 * CONFIG.logit_divisor  # the rate is divided by that
        expected = hidden if parameter.ndim == 2 and ".layers." in name else 0.0
        assert decay[id(parameter)] == expected, name


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_decay_does_not_depend_on_the_width(optimizer: str) -> None:
    """A step without a gradient shrinks a layer's matrix by the same factor at every width."""
    shrunk = []
    for width in (64, 128, 256, 512):
        config = replace(CONFIG, hidden_size=width, num_attention_heads=width // 16, num_key_value_heads=1)
        model = MiniCPM(config).init_weights()
        before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
        optimizers = build_optimizers(model, config, optimizer, lr=0.01, matrix_lr=0.02, weight_decay=0.1)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for one in optimizers:
            one.step()
        shrunk.append(float((model.model.layers[0].mlp.up_proj.weight.detach() / before).mean()))
    rate = 0.02 if optimizer == "muon" else 0.01
    assert shrunk == pytest.approx([1 - rate * 0.1] * 4, rel=1e-6)
