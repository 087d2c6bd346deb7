"""The training-time test against inference: what a head is trained on is what it will do.

Every (step, row) of the unrolled training pass must give the logits of a draft of that depth that began at that row.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh import fresh_model

from minicpm_ref.config import ModelConfig
from minicpm_ref.data import Corpus
from minicpm_ref.model import MiniCPM
from minicpm_ref.speculative import DraftHead, load_head
from minicpm_ref.training import Recipe, Trainer, read_state
from minicpm_ref.training import training_time_test as module
from minicpm_ref.training.continuations import Continuations
from minicpm_ref.training.recipes import get_recipe, get_trainer
from minicpm_ref.training.recipes.eagle3 import HeadRecipe, HeadTrainer
from minicpm_ref.training.training_time_test import TrainingTimeTest, fresh_head

CONFIG = ModelConfig(40, 32, 2, 4, 2, 48, max_position_embeddings=64)
LAYERS = (0, 1, 2)
KEPT = torch.tensor([0, 2, 5, 7, 11, 12, 20, 33, 39])
STEPS, LENGTH = 4, 11
IDS = torch.randint(0, 40, (2, LENGTH), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def target() -> MiniCPM:
    return fresh_model(CONFIG, seed=2).double()


@pytest.fixture
def head(target: MiniCPM) -> DraftHead:
    head = fresh_head(target, KEPT, LAYERS).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in head.parameters():  # nothing special about any entry
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return head


@torch.no_grad()
def features_of(target: MiniCPM, ids: torch.Tensor) -> torch.Tensor:
    states = target.hidden_states(ids)
    return torch.cat([states[layer] for layer in LAYERS], -1)


@torch.no_grad()
def drafted(head: DraftHead, ids: torch.Tensor, features: torch.Tensor, row: int, depth: int) -> torch.Tensor:
    """Logits [Vd] of the guess number `depth` of a draft that begins with true features up to `row`, the guesses before
    it being the text's own tokens."""
    state, memory = head(ids[:, 1 : row + 2], features[:, : row + 1], torch.arange(row + 1))
    state = state[:, -1:]
    for step in range(1, depth + 1):
        token = ids[:, row + 1 + step, None]
        state, memory = head(token, state, torch.tensor([row + step]), memory)
    return head.logits(state)[0, 0]


def differences(head: DraftHead, target: MiniCPM) -> float:
    """The largest difference between training and inference over all steps and rows whose tokens exist (D5)."""
    ids = IDS[:1]
    features = features_of(target, ids)
    with torch.no_grad():
        unrolled = TrainingTimeTest(head, target, STEPS).unroll(ids, features)
    worst = 0.0
    for step in range(STEPS):
        for row in range(LENGTH - 1 - step):
            expected = drafted(head, ids, features, row, step)
            worst = max(worst, float((unrolled[step][0, row] - expected).abs().max()))
    return worst


def test_training_equals_inference(target: MiniCPM, head: DraftHead) -> None:
    assert differences(head, target) < 1e-5  # float64, but the norms and the softmax keep float32 statistics


def shrunk(q, past):
    """Masks the last keys of the causal block at later steps, as the trainer of 2025 did before its correction."""
    steps = len(past) - 1
    rows = q.shape[2]
    mask = torch.ones(rows, rows, dtype=torch.bool).tril(-steps)
    mask[:, 0] = True
    group = q.shape[1] // past[0].keys.shape[1]
    keys = [memory.keys.repeat_interleave(group, 1) for memory in past]
    values = [memory.values.repeat_interleave(group, 1) for memory in past]
    block = (q @ keys[0].mT).masked_fill(~mask, -torch.inf)
    scores = torch.cat([block, *((q * k).sum(-1, keepdim=True) for k in keys[1:])], -1)
    weights = (scores * q.shape[-1] ** -0.5).softmax(-1)
    out = weights[..., :rows] @ values[0]
    for index, v in enumerate(values[1:]):
        out = out + weights[..., rows + index, None] * v
    return out


@pytest.mark.parametrize(
    "fault", ["shrunk block", "no diagonals", "position of step 0", "fc on states", "row off by one"]
)
def test_each_fault_of_training_shows(target: MiniCPM, head: DraftHead, fault: str, monkeypatch) -> None:
    attend, rotated, ahead = module._attend, DraftHead.rotated, module._ahead
    if fault == "shrunk block":
        monkeypatch.setattr(module, "_attend", lambda q, past: attend(q, past) if len(past) == 1 else shrunk(q, past))
    elif fault == "no diagonals":
        monkeypatch.setattr(module, "_attend", lambda q, past: attend(q, past[:1]))
    elif fault == "position of step 0":
        unroll = TrainingTimeTest.unroll

        def still(self, ids, features, steps=None):
            monkeypatch.setattr(DraftHead, "rotated", lambda s, x, p: rotated(s, x, p - p[0]))
            found = unroll(self, ids, features, steps)
            monkeypatch.setattr(DraftHead, "rotated", rotated)
            return found

        monkeypatch.setattr(TrainingTimeTest, "unroll", still)
    elif fault == "fc on states":
        finish = DraftHead.finish
        unroll = TrainingTimeTest.unroll

        def through(self, ids, features, steps=None):
            monkeypatch.setattr(DraftHead, "finish", lambda s, r, a: finish(s, r, a).repeat(1, 1, 3))
            monkeypatch.setattr(DraftHead, "logits", lambda s, x: s.lm_head(s.norm(x[..., : x.shape[-1] // 3])))
            found = unroll(self, ids, features, steps)
            monkeypatch.undo()
            return found

        monkeypatch.setattr(TrainingTimeTest, "unroll", through)
    else:
        monkeypatch.setattr(module, "_ahead", lambda x, by: ahead(x, by - 1))
    assert differences(head, target) > 1e-3


def test_losses_are_those_of_the_definition(target: MiniCPM, head: DraftHead) -> None:
    """Cross-entropy with the target's law over the kept tokens, on rows whose predicted token the target wrote and
    whose best token is kept; the mean counts every row."""
    written = torch.zeros(2, LENGTH, dtype=torch.bool)
    written[0, 4:9] = True
    written[1, 6:] = True
    test = TrainingTimeTest(head, target, STEPS)
    found = test(IDS, written)
    with torch.no_grad():
        logits = target(IDS).float()
    unrolled = [part.detach().float() for part in test.unroll(IDS, features_of(target, IDS))]
    for step in range(STEPS):
        total, passed, asked = 0.0, [], 0
        for line in range(2):
            for row in range(LENGTH - 1):
                guessed = row + 2 + step  # the token that row guesses at this step
                if guessed >= LENGTH or not written[line, guessed]:
                    continue
                asked += 1
                law = logits[line, guessed - 1].softmax(-1)
                q = unrolled[step][line, row].softmax(-1)
                passed.append(float(torch.minimum(law[KEPT], q).sum()))
                if int(law.argmax()) in KEPT.tolist():
                    kept = law[KEPT] / law[KEPT].sum()
                    total -= float((kept * q.log()).sum())
        assert found.losses[step].item() == pytest.approx(total / (2 * (LENGTH - 1)), rel=1e-4)
        assert found.acceptance[step].item() == pytest.approx(np.mean(passed) if asked else 0.0, rel=1e-4, abs=1e-6)


def test_gradients_reach_through_all_steps_and_only_the_head(target: MiniCPM, head: DraftHead) -> None:
    written = torch.ones(2, LENGTH, dtype=torch.bool)
    test = TrainingTimeTest(head, target, STEPS)
    last = test(IDS, written).losses[-1]
    last.backward()
    assert head.fc.weight.grad is not None  # `fc` acts at step 0 alone, and step 3 learns through it
    assert head.fc.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in target.parameters())
    assert not any("target" in name for name in test.state_dict())
    assert len(test(IDS, written, 2).losses) == 2
    with pytest.raises(ValueError, match="steps = 0"):
        TrainingTimeTest(head, target, 0)


# ---- texts and runs --------------------------------------------------------------------------------------------------

SMALL = ModelConfig(480, 64, 2, 4, 1, 128, max_position_embeddings=256)
RUN = {"context": 32, "batch_tokens": 128, "precision": "float32", "rows": 24, "held_rows": 8, "prompt": 8,
       "layers": (0, 1, 2), "draft_vocab_size": 64, "unrolled": 3, "warmup_tokens": 128, "lr": 0.01,
       "shallow_share": 0.5}  # fmt: skip


@pytest.fixture(scope="module")
def parent(corpus: Corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parent")
    settings = {"tokens": 10 * 256, "context": 32, "batch_tokens": 256, "precision": "float32", "warmup_tokens": 256}
    Trainer(Recipe("tiny", SMALL, **settings), corpus, folder).run()
    return folder / "model"


def test_continuations_are_the_targets_own_and_resume(corpus: Corpus, parent: Path, tmp_path: Path) -> None:
    settings = Continuations(rows=12, length=20, prompt=6, batch=4, temperatures=(0.0, 0.9, 0.9))
    model = Recipe("x", SMALL, 1, parent=str(parent)).build_model().eval()
    texts = settings.build(model, "hash", corpus, tmp_path / "a")
    assert texts.shape == (12, 20)
    for index in range(3):
        prompts = corpus.batch(index, 4, 6, 0)[0]
        assert (texts[4 * index : 4 * index + 4, :6] == prompts.numpy()).all()
    greedy = torch.from_numpy(texts[:4].astype(np.int64))
    with torch.no_grad():
        best = model(greedy).argmax(-1)
    assert (best[:, 5:-1] == greedy[:, 6:]).float().mean() > 0.95  # equal but for ties in another order of sums
    path = tmp_path / "b" / "continuations.bin"
    path.parent.mkdir()
    path.write_bytes((tmp_path / "a" / "continuations.bin").read_bytes()[: 4 * 20 * 2 + 7])  # cut inside batch 1
    (tmp_path / "b" / "continuations.json").write_text((tmp_path / "a" / "continuations.json").read_text())
    assert (settings.build(model, "hash", corpus, tmp_path / "b") == texts).all()
    with pytest.raises(ValueError, match="another target"):
        settings.build(model, "other", corpus, tmp_path / "a")
    with pytest.raises(ValueError, match="multiple of batch"):
        Continuations(rows=13, batch=4)
    with pytest.raises(ValueError, match="prompt = 20"):
        Continuations(rows=4, length=20, prompt=20, batch=4)


def test_a_run_resumes_exactly_and_stores_a_head_with_its_card(
    corpus: Corpus, parent: Path, tmp_path: Path, monkeypatch
) -> None:
    from minicpm_ref.training.recipes import eagle3

    monkeypatch.setattr(
        eagle3, "Continuations", lambda rows, length, prompt, seed: Continuations(rows, length, prompt, 8, seed=seed)
    )
    monkeypatch.setattr(eagle3, "SHAPES", {"chain of 2": (1, 2, 2)})
    monkeypatch.setattr(eagle3, "measure", partial(eagle3.measure, prompts=2, tokens=8))
    recipe = HeadRecipe("head", SMALL, tokens=8 * 128, parent=str(parent), **RUN)
    HeadTrainer(recipe, corpus, tmp_path / "whole").run()
    HeadTrainer(recipe, corpus, tmp_path / "parts").run(stop_at=3)
    HeadTrainer(recipe, corpus, tmp_path / "parts").run()
    whole, parts = (read_state(tmp_path / name).weights for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert "acceptance_2" in lines[-1]
    card = json.loads((tmp_path / "whole" / "model" / "card.json").read_text())
    assert card["parent"]["name"] == str(parent)
    assert set(card["acceptance_length"]) == {"chain of 2"}
    assert card["acceptance_length"]["chain of 2"]["0.0"] >= 1.0
    model = recipe.build_model()
    head = load_head(tmp_path / "whole" / "model", model)
    assert len(head.vocabulary) == 64
    assert set(recipe.config.eos_token_id) <= set(head.vocabulary.tolist())
    stored = {name.removeprefix("head."): tensor for name, tensor in whole.items()}
    for name, tensor in head.state_dict().items():
        assert torch.allclose(tensor, stored[name].to(tensor.dtype), rtol=1e-3, atol=1e-4)  # stored in float16


def test_the_recipe_is_found_with_its_trainer() -> None:
    assert get_trainer("eagle3") is HeadTrainer
    assert get_trainer("base") is Trainer
    recipe = get_recipe("eagle3")
    assert isinstance(recipe, HeadRecipe)
    assert recipe.unrolled == 7
    with pytest.raises(ValueError, match="parent = None"):
        replace(recipe, parent=None).target_folder  # noqa: B018
