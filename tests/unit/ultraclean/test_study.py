"""The study of cleaning: what its small parts measure, and that its figure is drawn from whatever is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minicpm_ref.studies import ultraclean as study
from minicpm_ref.ultraclean.documents import Document
from minicpm_ref.ultraclean.planted import WORDS


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[Document]:
    """Stand-ins for the files of this machine."""
    made = []
    for i in range(1, 21):
        pairs = zip(WORDS, WORDS[i:], strict=False)
        made.append(Document(f"f{i}", "stdlib", " ".join(f"{a} of {b}{chr(97 + i)}" for a, b in pairs)))
    monkeypatch.setattr(study, "real_files", lambda good: made)
    return made


def test_planted_junk_is_counted(files: list[Document]) -> None:
    found = study.measure_planted(10, 3)
    assert set(found["recall"].values()) == {1.0}
    assert found["precision"] == 1.0
    assert found["real_files_rejected"] == []


def test_duplicates_are_judged_by_the_exact_value_of_every_pair(files: list[Document]) -> None:
    found = study.measure_duplicates(20, [0.0, 0.02, 0.5], 0.8)
    assert found["documents"] == 40
    assert found["pairs"] == 40 * 39 // 2
    assert found["false_merges"] == 0
    assert found["recall"] >= 0.9
    gone, every = found["gone_and_all_by_jaccard_value"]["0.95"]
    assert gone == every >= 7, "unchanged copies go"


@pytest.mark.parametrize("whole", [False, True])
def test_the_figure_draws_what_is_there(whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "figures")
    import draw

    results: dict[str, Any] = {
        "device": "a machine", "versions": {"torch": "2"}, "date": "2026-01-01",
        "settings": {"clean": {"bands": 14, "rows": 8, "near_threshold": 0.8}},
        "duplicates": {"gone_and_all_by_jaccard_value": {"0.50": [0, 3], "0.90": [4, 5]}},
    }  # fmt: skip
    if whole:
        runs = {name: {"0": 2.0, "1": 2.1} for name in ("raw", "rules", "classifier")}
        decision = {"gain": 0.1, "error": 0.01}
        rounds = [{"round": 1, "decision": decision, "kept": True}, {"round": 2, "decision": None, "kept": False}]
        results |= {"training": {"held_out_bits_per_byte": runs}, "loop": {"rounds": rounds}}
    (tmp_path / "ultraclean.json").write_text(json.dumps(results))
    draw.draw(["ultraclean"], tmp_path, tmp_path)
    drawn = (tmp_path / "ultraclean.svg").read_text()
    assert len(drawn) > 10_000
