"""Verification and the loop, whole and small: paired decays, the rule, rollback, and kill -9."""

from __future__ import annotations

import json
import random
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minicpm_ref import save
from minicpm_ref.config import ModelConfig
from minicpm_ref.data import Corpus
from minicpm_ref.model import MiniCPM
from minicpm_ref.ultraclean.classifier import ClassifierSettings
from minicpm_ref.ultraclean.loop import LoopSettings, draw, run_loop
from minicpm_ref.ultraclean.planted import word_salad
from minicpm_ref.ultraclean.verify import AnnealRecipe, Verifier, VerifySettings, decide, default_corpus, write_tokens

CONFIG = ModelConfig(480, 64, 1, 2, 1, 96, max_position_embeddings=256)
CLASSIFIER = ClassifierSettings(dim=8, buckets=2000, epochs=20, lr=0.5, min_count=1)


def functions(seed: int, count: int = 12) -> str:
    rng = random.Random(seed)
    return "".join(f"def function_{i}_{rng.randrange(99)}(first):\n    return first + {i}\n\n\n" for i in range(count))


@pytest.fixture(scope="module")
def parent(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parent")
    save(MiniCPM(CONFIG).init_weights(0), folder, corpus.tokenizer)
    return folder


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Verified documents, and a raw pool of which half is shuffled words."""
    folder = tmp_path_factory.mktemp("pools")
    rows = [{"id": f"good {i}", "text": functions(i)} for i in range(40)]
    raw = [{"id": f"raw {i}", "text": functions(1000 + i)} for i in range(40)]
    raw += [{"id": f"salad {i}", "text": word_salad(functions(2000 + i), i)} for i in range(40)]
    for name, lines in (("good", rows), ("raw", raw)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "good.jsonl", folder / "raw.jsonl"


@pytest.fixture(scope="module")
def default(corpus: Corpus, pools: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    texts = [json.loads(line)["text"] for line in pools[1].read_text().splitlines()]
    return default_corpus(tmp_path_factory.mktemp("default"), texts, corpus)


def settings(parent: Path, **more: Any) -> LoopSettings:
    verify = VerifySettings(str(parent), 8 * 256, 64, 256, 0.5, (0, 1), 0.01, 0.02, 5000)
    return LoopSettings(rounds=2, seeds=20, classifier=CLASSIFIER, verify=verify, **more)


def test_the_rule() -> None:
    assert decide([1.0, 1.2, 1.1], [0.9, 1.1, 1.0]).verified
    assert not decide([1.0, 1.2, 1.1], [1.0, 1.2, 1.1]).verified
    assert not decide([1.0, 1.0], [0.9, 1.05]).verified, "a mean gain inside its error is none"
    assert not decide([0.9, 1.1], [1.0, 1.2]).verified
    with pytest.raises(ValueError, match="at least two"):
        decide([1.0], [0.9])


def test_a_share_of_the_rows_is_the_candidate_and_the_rest_is_the_default(corpus: Corpus, tmp_path: Path) -> None:
    np.full(500, 7, dtype="<u2").tofile(tmp_path / "candidate.bin")
    recipe = AnnealRecipe("a", CONFIG, 5120, 64, 640, candidate=str(tmp_path / "candidate.bin"), share=0.3)
    plain = AnnealRecipe("a", CONFIG, 5120, 64, 640)
    mixed, same = recipe.batch(corpus, 3, 0, 1), plain.batch(corpus, 3, 0, 1)
    for one, other in zip(mixed, same, strict=True):
        assert torch.equal(one[:7], other[:7]), "the default rows of both arms are the same"
        assert (one[7:] == 7).all()
        assert not (other[7:] == 7).all()


def test_runs_are_kept_and_not_repeated(corpus: Corpus, parent: Path, tmp_path: Path) -> None:
    write_tokens(tmp_path / "c.bin", [functions(5, 40)], corpus.tokenizer)
    verify = settings(parent).verify
    decision = Verifier(corpus, verify, tmp_path / "runs.json").verify(tmp_path / "c.bin")
    lines: list[str] = []
    again = Verifier(corpus, verify, tmp_path / "runs.json", lines.append).verify(tmp_path / "c.bin")
    assert (again, lines) == (decision, [])
    assert len(json.loads((tmp_path / "runs.json").read_text())["runs"]) == 4
    with pytest.raises(ValueError, match="other settings"):
        Verifier(corpus, VerifySettings(), tmp_path / "runs.json")


def test_a_draw_does_not_depend_on_the_order(pools: tuple[Path, Path]) -> None:
    from minicpm_ref.ultraclean.loop import documents_of

    documents = list(documents_of([pools[0]]))
    chosen = {document.id for document in draw(iter(documents), 5, "salt")}
    assert {document.id for document in draw(reversed(documents), 5, "salt")} == chosen
    assert {document.id for document in draw(iter(documents), 5, "other")} != chosen


@pytest.fixture(scope="module")
def looped(
    pools: tuple[Path, Path], default: Corpus, parent: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("loop") / "out"
    run_loop([pools[0]], [pools[1]], default, out, settings(parent))
    return out


def result(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "loop.json").read_text())
    return content


def test_the_loop_filters_verifies_and_says_so(looped: Path) -> None:
    content = result(looped)
    assert len(content["rounds"]) == 2
    for record in content["rounds"]:
        assert record["scored"] == 80
        words = "kept" if record["kept"] else "rolled back"
        assert record["log"].startswith(f"round {record['round']}: {words}")
    assert (looped / "log.txt").read_text().splitlines() == [record["log"] for record in content["rounds"]]
    first = (looped / "round_1" / "filtered.jsonl").read_text().splitlines()
    names = [json.loads(line)["id"] for line in first]
    assert sum(name.startswith("raw") for name in names) >= 0.9 * len(names) > 9
    kept = [record["round"] for record in content["rounds"] if record["kept"]]
    assert content["result"] == (f"round_{kept[-1]}/filtered.jsonl" if kept else None)


def test_a_round_that_does_not_verify_is_rolled_back(
    pools: tuple[Path, Path], default: Corpus, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verdicts from a table instead of training: worse, better, worse, better than the kept one."""
    bits = {0: 1.0, 1: 1.1, 2: 0.9, 3: 0.95, 4: 0.8}

    def told(self: Verifier, candidate: Path | None, seed: int) -> float:
        number = int(candidate.parent.name[-1]) if candidate else 0
        return bits[number] + 0.01 * seed + (0.001 * seed if candidate else 0)

    monkeypatch.setattr(Verifier, "bits", told)
    content = run_loop([pools[0]], [pools[1]], default, tmp_path / "out", LoopSettings(
        rounds=4, seeds=20, classifier=CLASSIFIER, verify=settings(parent).verify))  # fmt: skip
    assert [record["kept"] for record in content["rounds"]] == [False, True, False, True]
    words = [record["log"].split(", ")[0] for record in content["rounds"]]
    assert words == [
        "round 1: rolled back: against the default mixture",
        "round 2: kept: against the default mixture",
        "round 3: rolled back: against round 2",
        "round 4: kept: against round 2",
    ]
    assert content["result"] == "round_4/filtered.jsonl"
    hashes = [record["seeds"]["sha256"] for record in content["rounds"]]
    assert len(set(hashes)) == 4, "a rolled-back round is followed by another draw"


def test_killed_and_called_again_it_gives_the_same(
    pools: tuple[Path, Path], default: Corpus, parent: Path, looped: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ([pools[0]], [pools[1]], default, out, settings(parent))
    marks = [out / "round_1" / "filter.json", out / "round_2" / "classifier" / "model.bin"]
    for mark in marks:
        process = get_context("spawn").Process(target=run_loop, args=arguments)
        process.start()
        while process.is_alive() and not mark.exists():
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert mark.exists()
    run_loop(*arguments)
    assert result(out) == result(looped)
    with pytest.raises(ValueError, match=r"settings\.draw = 0, now 1"):
        run_loop([pools[0]], [pools[1]], default, out, settings(parent, draw=1))
