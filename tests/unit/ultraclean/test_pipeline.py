"""The whole run: every document in one place, resume after kill -9, other settings refused, workers equal."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import time
from collections import Counter
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

import pytest

from minicpm_ref.checkpoint import EMBEDDED
from minicpm_ref.tokenizer import Tokenizer
from minicpm_ref.ultraclean import CleanSettings, clean, train_classifier
from minicpm_ref.ultraclean.classifier import ClassifierSettings
from minicpm_ref.ultraclean.decontaminate import embedded_items
from minicpm_ref.ultraclean.planted import KINDS, WORDS, near_copy, plant
from minicpm_ref.ultraclean.records import locked

REAL = [text for _, text in embedded_items(EMBEDDED / "held_out.jsonl") if len(text) < 12_000]
STRANGE = [
    "x\u00b2 and 10\u207b\u00b3, n\u00ba, caf\u00e9, \u0915\u0941, \u304c, \u0439, \ud55c\u2028 "
    + " ".join(f"word{c}{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    "中文的句子没有空格，但是每一个字都是一个词，所以这段文字足够长，可以通过长度的规则。\r\n😀e\u0301",
]  # fmt: skip
SETTINGS = CleanSettings(shard_bytes=60_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real files, copies, contaminated ones, planted junk, broken files, in three formats."""
    root = tmp_path_factory.mktemp("input") / "data"
    (root / "code").mkdir(parents=True)
    for i, text in enumerate(REAL):
        (root / "code" / f"{i:03d}.py").write_text(text, newline="")
    rows = [{"id": f"strange {i}", "text": text} for i, text in enumerate(STRANGE)]
    rows += [{"id": kind, "text": plant(kind, 1)} for kind in KINDS] + [{"id": "null", "text": None}]
    rows += [{"id": f"copy {i}", "text": near_copy(text, 0.005, i)} for i, text in enumerate(REAL[:8])]
    rows += [{"id": "exact", "text": REAL[3]}, {"id": "empty", "text": ""}]
    rows += [{"id": "contaminated", "text": "Look: " + ITEM + " ".join([" and so on"] * 2)}]
    (root / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), newline="")
    (root / "broken.txt").write_bytes(b"\xff\xfe\x00")
    pairs = zip(WORDS, WORDS[1:], strict=False)
    (root / "odd\u2028\u0085name.txt").write_text(" ".join(f"{a} is {b}" for a, b in pairs))
    return root


ITEM = "the quick brown fox jumps over the lazy dog while seven wizards boil a pot of green soup at midnight"


@pytest.fixture(scope="module")
def against(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("against") / "items.jsonl"
    path.write_text(json.dumps({"id": "task", "text": ITEM}) + "\n")
    return path


@pytest.fixture(scope="module")
def cleaned(folder: Path, against: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    clean([folder], out, settings_of(against))
    return out


def settings_of(against: Path, **more: Any) -> CleanSettings:
    return CleanSettings(shard_bytes=60_000, against=(str(against),), **more)


def hashes(out: Path) -> dict[str, str]:
    paths = [*(out / "kept").iterdir(), *(out / "rejected").iterdir(), out / "manifest.json", out / "report.html"]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def rows(out: Path, part: str) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted((out / part).iterdir()) for line in path.read_bytes().splitlines()]


def test_every_document_is_in_one_place_with_one_reason(folder: Path, cleaned: Path) -> None:
    manifest = json.loads((cleaned / "manifest.json").read_text())
    kept, rejected = rows(cleaned, "kept"), rows(cleaned, "rejected")
    lines = (folder / "rows.jsonl").read_bytes().count(b"\n")
    assert manifest["documents"] == len(kept) + len(rejected) == len(REAL) + lines + 2
    assert len({row["id"] for row in kept + rejected}) == len(kept) + len(rejected)
    reasons = {row["id"]: row["reason"] for row in rejected}
    for kind, (_, names) in KINDS.items():
        assert reasons[kind] in names
    assert Counter(reasons.values())["text_not_a_string"] == 1
    assert reasons["empty"] == "empty"
    assert reasons["exact"] == "exact_duplicate"
    assert reasons["contaminated"] == "contaminated"
    assert reasons["data/broken.txt"] == "undecodable"
    assert Counter(reasons.values())["near_duplicate"] >= 4
    counted = Counter(row["reason"] for row in rejected)
    assert {r: n for stage in manifest["rejected"].values() for r, n in stage.items()} == counted
    assert "data/odd\u2028\u0085name.txt" in {row["id"] for row in kept}
    evidence = next(row["detail"] for row in rejected if row["id"] == "contaminated")
    assert evidence == "1 of task: the quick brown fox jumps over the lazy dog while seven wizards boil"


def test_kept_text_is_the_input_byte_for_byte(folder: Path, cleaned: Path) -> None:
    kept = {row["id"]: row["text"] for row in rows(cleaned, "kept")}
    for i, text in enumerate(STRANGE):
        assert kept[f"strange {i}"] == text
    for name, text in kept.items():
        if name.endswith(".py"):
            assert text.encode() == (folder.parent / name).read_bytes()


def test_two_workers_and_a_second_call_change_nothing(
    folder: Path, against: Path, cleaned: Path, tmp_path: Path
) -> None:
    clean([folder], tmp_path / "out", settings_of(against), workers=2)
    before = hashes(cleaned)
    assert hashes(tmp_path / "out") == before
    clean([folder], cleaned, settings_of(against))
    assert hashes(cleaned) == before


def test_ray_gives_the_same_files(
    folder: Path, against: Path, cleaned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="the extra `distributed` is not installed")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "200")  # starting it is slow on a busy machine
    from minicpm_ref.ultraclean.cluster import run_shards_on_ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        clean([folder], tmp_path / "out", settings_of(against), workers=2, runner=run_shards_on_ray)
    finally:
        ray.shutdown()
    assert hashes(tmp_path / "out") == hashes(cleaned)


def test_a_lost_or_cut_output_is_made_again(folder: Path, against: Path, cleaned: Path) -> None:
    before = hashes(cleaned)
    times = {path: path.stat().st_mtime_ns for path in (cleaned / "work").glob("*.survivors.jsonl")}
    kept = sorted((cleaned / "kept").iterdir())
    kept[0].unlink()
    kept[1].write_bytes(kept[1].read_bytes()[:-5])
    (cleaned / "kept" / ".00000.jsonl.1.tmp").write_bytes(b"half a file of a killed writer")
    clean([folder], cleaned, settings_of(against))
    assert hashes(cleaned) == before
    assert times == {path: path.stat().st_mtime_ns for path in (cleaned / "work").glob("*.survivors.jsonl")}


def test_other_settings_or_input_are_refused_by_name(
    folder: Path, against: Path, cleaned: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"settings\.near_threshold = 0\.8, now 0\.7"):
        clean([folder], cleaned, settings_of(against, near_threshold=0.7))
    with pytest.raises(ValueError, match=r"inputs"):
        clean([folder / "code"], cleaned, settings_of(against))
    with locked(tmp_path), pytest.raises(RuntimeError, match="another run is at work"):
        clean([folder], tmp_path)
    with pytest.raises(RuntimeError, match="broken.txt: undecodable"):
        clean([folder], tmp_path, CleanSettings(strict=True))


@pytest.mark.skipif("fork" not in get_all_start_methods(), reason="needs a cheap copy of this process")
def test_killed_at_random_moments_it_goes_on(folder: Path, against: Path, cleaned: Path, tmp_path: Path) -> None:
    """Signal 9 at moments spread over the run, then calls until it ends: the same files, bytes and counts."""
    rng = random.Random(0)
    kills = 0
    for _ in range(20):
        process = get_context("fork").Process(target=clean, args=([folder], tmp_path, settings_of(against)))
        process.start()
        begun = len(list(tmp_path.rglob("*.json")))
        wanted = begun + rng.randrange(3)
        while process.is_alive() and len(list(tmp_path.rglob("*.json"))) < wanted:
            time.sleep(0.001)
        time.sleep(rng.random() / 20)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= 3
    clean([folder], tmp_path, settings_of(against))
    assert hashes(tmp_path) == hashes(cleaned)


def test_the_classifier_takes_its_share(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(EMBEDDED / "base" / "tokenizer.json")
    bad = [near_copy(text, 0.4, i) for i, text in enumerate(REAL)]
    small = ClassifierSettings(dim=16, buckets=5000, epochs=20, lr=0.5, min_count=1)
    classifier = train_classifier(REAL, bad, tokenizer, tmp_path / "classifier", small)
    path = tmp_path / "rows.jsonl"
    texts = [*REAL, *(near_copy(text, 0.4, 1000 + i) for i, text in enumerate(REAL))]
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)), newline="")
    settings = CleanSettings(classifier=str(tmp_path / "classifier"), limits={"max_few_words_with_letters": 1})
    manifest = clean([path], tmp_path / "out", settings)
    assert manifest["classifier_sha256"] == classifier.sha256
    assert manifest["threshold"] == classifier.threshold
    low = [row for row in rows(tmp_path / "out", "rejected") if row["reason"] == "low_score"]
    kept = rows(tmp_path / "out", "kept")
    assert sum(manifest["scores"]) == len(low) + len(kept)
    assert all(row["score"] < classifier.threshold for row in low)
    assert all(row["score"] >= classifier.threshold for row in kept)
    assert sum(int(row["id"]) >= len(REAL) for row in low) >= 0.9 * len(low) > 0, "what goes is what was made bad"
    assert sum(int(row["id"]) < len(REAL) for row in kept) > 0.5 * len(kept), "what stays is mostly what was not"
    # another classifier in the same folder is another run
    (tmp_path / "classifier" / "model.bin").write_bytes(b"another")
    with pytest.raises(ValueError, match="classifier_sha256"):
        clean([path], tmp_path / "out", settings)
