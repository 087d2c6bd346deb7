"""The loop: verified seeds train a classifier, the classifier filters, training judges, and the judged are the seeds.

The problem: a classifier is as good as its seeds, and nobody knows good seeds beforehand.
The idea, a round: positives are drawn from data that has verified, negatives from the raw pools (as many, and as many
from each pool); the classifier trained on them scores every document; what passes its threshold is the candidate, and
`verify` anneals on it. If it verifies, the round is kept: its best- and worst-scored documents are the next round's
seeds, and its anneals are what the next round must beat. If not, it is rolled back: the next round starts from the last
kept seeds with another draw, and the log says so.

Every step of every round ends with a record, so that kill -9 at any moment and the same call go on; draws are by hash,
so the result does not depend on when that happened. `loop.json` at the end holds settings, counts, hashes and verdicts.

Source: Ultra-FineWeb (arXiv 2505.05427) section 3.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minicpm_ref.data import Corpus
from minicpm_ref.files import replacing, write_text
from minicpm_ref.tokenizer import Tokenizer
from minicpm_ref.ultraclean.classifier import Classifier, ClassifierSettings, train_classifier
from minicpm_ref.ultraclean.documents import Document, make_plan, read_piece
from minicpm_ref.ultraclean.records import check_manifest, finished, locked, versions, write_record
from minicpm_ref.ultraclean.verify import Verifier, VerifySettings, decide, write_tokens


@dataclass(frozen=True)
class LoopSettings:
    """Rounds, seeds of each kind a round, tokens of the candidate that verification sees, and the parts' settings."""

    rounds: int = 3
    seeds: int = 2000
    candidate_tokens: int = 4_000_000
    draw: int = 0
    classifier: ClassifierSettings = field(default_factory=ClassifierSettings)
    verify: VerifySettings = field(default_factory=VerifySettings)


def documents_of(inputs: Sequence[str | Path]) -> Iterator[Document]:
    """Every readable document of the inputs; the pools have been cleaned, and cleaning lists what is unreadable."""
    for shard in make_plan(inputs).shards:
        for piece in shard:
            yield from (item for item in read_piece(piece) if isinstance(item, Document))


def draw(documents: Iterator[Document], count: int, salt: str) -> list[Document]:
    """`count` of the documents, those with the smallest hash of salt and id: random, and the same in every order."""
    chosen = heapq.nsmallest(
        count, ((hashlib.sha256(f"{salt}|{d.id}".encode()).digest(), i, d) for i, d in enumerate(documents))
    )
    return [document for *_, document in chosen]


@dataclass(frozen=True)
class Loop:
    """One loop in a folder. `verified` are inputs whose documents have verified (or are trusted), `pools` the raw ones,
    `corpus` is the default data that verification compares with."""

    folder: Path
    verified: tuple[str, ...]
    pools: tuple[str, ...]
    corpus: Corpus
    settings: LoopSettings
    report: Callable[[str], None] = lambda line: None

    def run(self) -> dict[str, Any]:
        """Run or continue; returns the content of `loop.json`. Raises ValueError for other settings or input."""
        with locked(self.folder):
            inputs = {
                name: [[file["source"], file["sha256"]] for file in make_plan(paths).files]
                for name, paths in (("verified", self.verified), ("pools", self.pools))
            }
            settings = {"settings": asdict(self.settings), "corpus": self.corpus.manifest_sha256, **inputs}
            check_manifest(self.folder / "begun.json", settings)
            verifier = Verifier(self.corpus, self.settings.verify, self.folder / "runs.json", self.report)
            rounds: list[dict[str, Any]] = []
            kept: dict[str, Any] | None = None
            for number in range(1, self.settings.rounds + 1):
                record = self.round(number, kept, verifier)
                rounds.append(record)
                kept = record if record["kept"] else kept
                write_text(self.folder / "log.txt", "".join(f"{record['log']}\n" for record in rounds))
            content = {
                **settings, "versions": versions(), "rounds": rounds,
                "result": f"round_{kept['round']}/filtered.jsonl" if kept else None,
            }  # fmt: skip
            write_text(self.folder / "loop.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return content

    def round(self, number: int, kept: dict[str, Any] | None, verifier: Verifier) -> dict[str, Any]:
        """One round: seeds, classifier, filter, verification, verdict. `kept` is the last round that was kept."""
        folder = self.folder / f"round_{number}"
        record = finished(folder / "round.json")
        if record is not None:
            return record
        folder.mkdir(exist_ok=True)
        good, bad = self._seeds(number, kept)
        classifier = self._classifier(folder, good, bad)
        counts = self._filter(folder, classifier)
        candidate = folder / "candidate.bin"
        seeds = self.settings.verify.seeds
        rival = self.folder / f"round_{kept['round']}" / "candidate.bin" if kept else None
        if counts["filtered"]:
            tokens = write_tokens(
                candidate, _texts(folder / "filtered.jsonl"), self.corpus.tokenizer, self.settings.candidate_tokens
            )
            bits = [verifier.bits(candidate, seed) for seed in seeds]
            decision = decide([verifier.bits(rival, seed) for seed in seeds], bits)
            against = f"against round {kept['round']}" if kept else "against the default mixture"
            state = "kept" if decision.verified else "rolled back"
            log = f"round {number}: {state}: {against}, {decision}"
            verdict = {"decision": asdict(decision), "kept": decision.verified, "tokens": tokens}
        else:
            write_tokens(candidate, [], self.corpus.tokenizer)
            log = f"round {number}: rolled back: no document passed the threshold {classifier.threshold:.3g}"
            verdict = {"decision": None, "kept": False, "tokens": 0}
        self.report(log)
        content = {
            "round": number, **verdict, "log": log, **counts, "threshold": classifier.threshold,
            "classifier": classifier.record["kept_out"], "classifier_sha256": classifier.sha256,
            "seeds": classifier.record["seeds"],
        }  # fmt: skip
        files = [folder / name for name in ("filtered.jsonl", "scores.jsonl", "candidate.bin")]
        write_record(folder / "round.json", files, content)
        return finished(folder / "round.json") or {}

    def _seeds(self, number: int, kept: dict[str, Any] | None) -> tuple[list[str], list[str]]:
        """Texts of the good and of the bad seeds, equally many."""
        count, salt = self.settings.seeds, f"{self.settings.draw} round {number}"
        if kept is None:
            good = draw(documents_of(self.verified), count, salt)
            share = -(-count // len(self.pools))
            bad = [d for pool in self.pools for d in draw(documents_of([pool]), share, salt)][:count]
        else:  # the best and the worst of the last kept round, drawn from twice as many, so that a new draw differs
            scores = list(_scores(self.folder / f"round_{kept['round']}" / "scores.jsonl"))
            top = {n for _, n in heapq.nlargest(2 * count, scores)}
            bottom = {n for _, n in heapq.nsmallest(2 * count, scores)}
            middle = top & bottom  # with few documents the two meet: those are neither
            everything = enumerate(documents_of(self.pools))
            chosen = [(n, d) for n, d in everything if n in top ^ bottom]
            good = draw((d for n, d in chosen if n in top - middle), count, salt)
            bad = draw((d for n, d in chosen if n in bottom - middle), count, salt)
        size = min(len(good), len(bad))
        return [d.text for d in good[:size]], [d.text for d in bad[:size]]

    def _classifier(self, folder: Path, good: list[str], bad: list[str]) -> Classifier:
        path = folder / "classifier"
        if finished(path / "done.json") is None:
            train_classifier(good, bad, self.tokenizer, path, self.settings.classifier)
            write_record(path / "done.json", [path / "model.bin", path / "classifier.json"], {})
        return Classifier(path)  # a killed round goes on with the classifier it had

    @property
    def tokenizer(self) -> Tokenizer:
        """The default corpus's."""
        return self.corpus.tokenizer

    def _filter(self, folder: Path, classifier: Classifier) -> dict[str, int]:
        """Score every document of the pools; write the scores, and the documents from the threshold on."""
        paths = [folder / "filtered.jsonl", folder / "scores.jsonl"]
        record = finished(folder / "filter.json")
        if record is not None:
            return {name: record[name] for name in ("scored", "filtered")}
        scored = passed = 0
        with (
            replacing(paths[0]) as filtered, open(filtered, "wb") as filtered_file,
            replacing(paths[1]) as scores, open(scores, "wb") as scores_file,
        ):  # fmt: skip
            for document in documents_of(self.pools):
                (score,) = classifier.score([document.text])
                scores_file.write(json.dumps({"n": scored, "id": document.id, "score": score}).encode() + b"\n")
                scored += 1
                if score >= classifier.threshold:
                    passed += 1
                    row = {"id": document.id, "source": document.source, "text": document.text, "score": score}
                    filtered_file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        write_record(folder / "filter.json", paths, {"scored": scored, "filtered": passed})
        return {"scored": scored, "filtered": passed}


def _texts(path: Path) -> Iterator[str]:
    """Texts of a filtered pool in the order of a hash, so that its first tokens are as mixed as all of them."""
    places = []
    with open(path, "rb") as file:
        while line := file.readline():
            places.append((hashlib.sha256(line).digest(), file.tell() - len(line)))
        for _, offset in sorted(places):
            file.seek(offset)
            yield json.loads(file.readline())["text"]


def _scores(path: Path) -> Iterator[tuple[float, int]]:
    with open(path, "rb") as file:
        for line in file:
            row = json.loads(line)
            yield row["score"], row["n"]


def run_loop(
    verified: Sequence[str | Path],
    pools: Sequence[str | Path],
    corpus: Corpus,
    out: str | Path,
    settings: LoopSettings | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the loop in folder `out`, or go on with it; see `Loop`."""
    good, raw = (tuple(str(Path(path).resolve()) for path in paths) for paths in (verified, pools))
    return Loop(Path(out).resolve(), good, raw, corpus, settings or LoopSettings(), report).run()
