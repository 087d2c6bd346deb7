"""The report: whatever documents and names hold is shown as text, and the page needs nothing but itself."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from minicpm_ref.ultraclean.report import page, samples, write_report

NASTY = ["<script>alert(1)</script>", "</pre>", "&amp;", "\"quotes'", "\ud800 half", "x" * 1_000_000, "<img src=http://a>"]


class Page(HTMLParser):
    """Tags, shown text, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.open: list[str] = []
        self.shown = ""
        self.attributes: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.shown += data


def manifest() -> dict[str, Any]:
    return {
        "documents": 8, "kept": 1, "inputs": [1], "rejected": {NASTY[0]: {NASTY[1]: 7}},
        "groups": {NASTY[0]: {"kept": 1}},
        "settings": {"bands": 14, "rows": 8, "near_threshold": 0.8, "against": [NASTY[0]]},
        "threshold": 0.5,
        "clusters": [{"kept": NASTY[0], "removed": 3, "most_of": [NASTY[1]]}], "too_short_to_match": [NASTY[0]],
        "scores": [0, 3, 5], "versions": {NASTY[0]: NASTY[3]},
    }  # fmt: skip


def test_everything_from_the_input_is_escaped(tmp_path: Path) -> None:
    rows = [
        {"id": text, "stage": NASTY[0], "reason": NASTY[1], "detail": text, "characters": 9, "excerpt": text}
        for text in NASTY
    ]
    text = page(manifest(), {(NASTY[0], NASTY[1]): rows})
    shown = Page(text)
    assert shown.open == []
    assert not set(shown.tags) & {"script", "img", "link", "iframe"}
    assert not set(shown.attributes) & {"src", "href", "onclick", "onerror"}
    for piece in NASTY:
        assert piece.replace("\ud800", "\\ud800") in shown.shown
    text.encode()


def test_rules_that_reject_all_or_nothing_are_marked() -> None:
    found = Page(page(manifest() | {"rejected": {"rules": {"symbols": 8}}}, {})).shown
    assert "symbols rejected every document: look at its limit." in found
    idle = found.split("Rules that rejected nothing here: ")[1].split(".")[0].split(", ")
    assert "licence" in idle
    assert "symbols" not in idle


def test_samples_are_chosen_by_id_whatever_the_order(tmp_path: Path) -> None:
    common = {"stage": "rules", "reason": "empty", "detail": "", "characters": 0, "excerpt": ""}
    rows = [{"id": f"{i}", **common} for i in range(50)]
    chosen = []
    for name, ordered in (("a", rows), ("b", rows[::-1])):
        (tmp_path / name / "rejected").mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in ordered)
        (tmp_path / name / "rejected" / "00000.jsonl").write_text(lines)
        chosen.append(samples(tmp_path / name))
    assert chosen[0] == chosen[1]
    assert len(chosen[0]["rules", "empty"]) == 8
    assert write_report(tmp_path / "a", manifest()).stat().st_size > 1000
