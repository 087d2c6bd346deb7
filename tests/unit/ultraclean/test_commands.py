"""`minicpm-ref clean`: a folder in one line, and options that are refused in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minicpm_ref.cli import app
from minicpm_ref.ultraclean.commands import parse_limits
from minicpm_ref.ultraclean.planted import WORDS, near_copy, plant


def test_a_folder_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "good.txt").write_text(" ".join(WORDS))
    (tmp_path / "mine" / "short.txt").write_text(" ".join(WORDS[:12]))
    (tmp_path / "mine" / "junk.txt").write_text(plant("boilerplate", 0))
    out = tmp_path / "out"
    arguments = ["clean", "files", str(tmp_path / "mine"), "--out", str(out), "--limit", "min_too_short=10"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "boilerplate" in result.output
    assert "3 documents" in result.output
    assert (out / "report.html").stat().st_size > 1000
    kept = [json.loads(line)["id"] for line in (out / "kept" / "00000.jsonl").read_text().split("\n") if line]
    assert kept == ["mine/good.txt", "mine/short.txt"]


def test_a_limit_has_a_name_and_a_number() -> None:
    assert parse_limits(["max_symbols=0.4"]) == {"max_symbols": 0.4}
    with pytest.raises(ValueError, match="expected NAME=NUMBER"):
        parse_limits(["max_symbols"])


def test_a_cluster_that_takes_most_of_a_source_is_flagged(tmp_path: Path) -> None:
    from minicpm_ref.ultraclean import clean

    text = " ".join(f"{a}{b}" for a in WORDS[:20] for b in WORDS[:20])
    for name, count in (("copies", 15), ("others", 2)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(count):
            words = near_copy(text, 0.005, i) if name == "copies" else " ".join(f"{w}{chr(97 + i)}" for w in WORDS)
            (tmp_path / "in" / name / f"{i:02d}.txt").write_text(words)
    manifest = clean([tmp_path / "in"], tmp_path / "out")
    (largest,) = manifest["clusters"]
    assert largest["kept"] == "in/copies/00.txt"
    assert largest["removed"] >= 10
    assert largest["most_of"] == ["in/copies"]
    assert "most of in/copies: look at it" in (tmp_path / "out" / "report.html").read_text()
