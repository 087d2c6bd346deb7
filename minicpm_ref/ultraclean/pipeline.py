"""Clean a folder: rules, decontamination, duplicates, classifier; every document kept or rejected with a reason.

The problem: a corpus does not fit into memory, and the machine that cleans it is killed half-way.
The idea: the input is cut into shards, and a shard passes three steps. `prepare` (any number of workers) reads it,
applies rules and decontamination, and leaves each survivor with its MinHash signature. `duplicates` (one process, in
the order of the input) compares survivors with everything kept so far. `finish` (any number of workers) scores with the
classifier and writes `kept/NNNNN.jsonl` and `rejected/NNNNN.jsonl`. Each step of each shard ends with a record
(`records`), names depend on the shard alone, and shards are joined by number: workers, order and kills change nothing.

The stages stand in the order of their cost per rejected document, the cheapest first.

    clean(["my_folder"], "cleaned")            # or: minicpm-ref clean files my_folder --out cleaned
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from minicpm_ref.files import replacing, write_text
from minicpm_ref.ultraclean.classifier import Classifier
from minicpm_ref.ultraclean.decontaminate import Contamination, read_items
from minicpm_ref.ultraclean.dedup import mark_duplicates, shingles, signature
from minicpm_ref.ultraclean.documents import Document, Plan, Unread, make_plan, read_piece, sha256_of
from minicpm_ref.ultraclean.filters import Rule, apply_rules, with_limits
from minicpm_ref.ultraclean.records import check_manifest, finished, locked, versions, write_record
from minicpm_ref.ultraclean.report import write_report
from minicpm_ref.ultraclean.workers import Task, run_shards

EXCERPT = 400  # characters of a rejected document that are kept to look at
Runner = Callable[[Task, Sequence[int], int, Callable[[int, Any], None]], None]


@dataclass(frozen=True)
class CleanSettings:
    """What decides the result. `limits` changes rules (see `with_limits`), `against` are files or folders of evaluation
    text, `classifier` is a folder with a trained one; `threshold` replaces the one it was calibrated to.

    14 bands of 8 rows find 92 % of the pairs at a Jaccard value of 0.8 and 5 % of those at 0.5.
    """

    shard_bytes: int = 32_000_000
    largest_bytes: int = 8_000_000
    strict: bool = False
    limits: dict[str, float] = field(default_factory=dict)
    near_threshold: float = 0.8
    bands: int = 14
    rows: int = 8
    shingle_words: int = 5
    against: tuple[str, ...] = ()
    overlap_limit: float = 0.5
    classifier: str | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Cleaner:
    """One run: its folder, settings and plan. Picklable, so that a worker on any machine that sees the folder can take
    a shard."""

    folder: Path
    settings: CleanSettings
    plan: Plan
    classifier_sha256: str | None = None

    @property
    def work(self) -> Path:
        """Where the steps leave what the next one reads."""
        return self.folder / "work"

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The rules with the settings' limits."""
        return with_limits(self.settings.limits)

    @property
    def contamination(self) -> Contamination:
        """The n-grams of the evaluation items."""
        return _contamination(self.settings.against, self.settings.overlap_limit)

    # ---- step 1: read, rules, decontamination, signatures ------------------------------------------------------------

    def prepare(self, shard: int) -> dict[str, Any]:
        """Write the survivors of a shard, their signatures, and what was rejected; returns the record."""
        name = f"{shard:05d}"
        record = finished(self.work / f"{name}.prepare.json")
        if record is not None:
            return record
        paths = [self.work / f"{name}.{part}" for part in ("survivors.jsonl", "signatures", "rejected.jsonl")]
        seen = survivors = 0
        with (
            replacing(paths[0]) as out, open(out, "wb") as out_file,
            replacing(paths[1]) as signatures, open(signatures, "wb") as signature_file,
            replacing(paths[2]) as rejected, open(rejected, "wb") as rejected_file,
        ):  # fmt: skip
            for piece in self.plan.shards[shard]:
                for item in read_piece(piece, self.settings.largest_bytes):
                    row = self._objection(item)
                    if row is None:
                        assert isinstance(item, Document)
                        out_file.write(_line({"n": seen, "id": item.id, "source": item.source, "text": item.text}))
                        sketch = signature(
                            shingles(item.text, self.settings.shingle_words), self.settings.bands * self.settings.rows
                        )
                        signature_file.write(sketch.astype("<u8").tobytes())
                        survivors += 1
                    else:
                        rejected_file.write(_line({"n": seen, **row}))
                    seen += 1
        write_record(self.work / f"{name}.prepare.json", paths, {"documents": seen, "survivors": survivors})
        return finished(self.work / f"{name}.prepare.json") or {}

    def _objection(self, item: Document | Unread) -> dict[str, Any] | None:
        """Why a document goes at this step, as a row of rejected.jsonl; None if it stays.

        Raises ValueError for an unreadable one in strict mode.
        """
        if isinstance(item, Unread):
            if self.settings.strict:
                raise ValueError(f"{item.id}: {item.reason} {item.detail} (strict: reading stops here)")
            return rejection(item, "read", item.reason, item.detail, "")
        broken = apply_rules(item.text, self.rules)
        if broken is not None:
            return rejection(item, "rules", *broken, item.text)
        match = self.contamination.match(item.text) if self.settings.against else None
        if match is not None:
            detail = f"{match.score:.3g} of {match.item}: {match.ngram}"
            return rejection(item, "decontamination", "contaminated", detail, item.text)
        return None

    # ---- step 3: classifier, and the result --------------------------------------------------------------------------

    def finish(self, shard: int) -> dict[str, Any]:
        """Write what is kept of a shard, and every rejected document with its reason; returns the record."""
        name = f"{shard:05d}"
        record_path = self.work / f"{name}.finish.json"
        record = finished(record_path, self.folder)
        if record is not None:
            return record
        duplicates = {row["n"]: row for row in _rows(self.work / f"{name}.duplicates.jsonl")}
        rejected = list(_rows(self.work / f"{name}.rejected.jsonl"))
        counts: Counter[str] = Counter()
        scores = [0] * 20
        paths = [self.folder / "kept" / f"{name}.jsonl", self.folder / "rejected" / f"{name}.jsonl"]
        with replacing(paths[0]) as out, open(out, "wb") as file:
            for row in self._scored(row for row in _rows(self.work / f"{name}.survivors.jsonl")):
                document, score = Document(row["id"], row["source"], row["text"]), row.get("score")
                if score is not None:
                    scores[min(int(score * 20), 19)] += 1
                if row["n"] in duplicates:
                    copy = duplicates[row["n"]]
                    reason = rejection(
                        document, "duplicates", f"{copy['kind']}_duplicate", f"{copy['jaccard']:g} with {copy['of']}",
                        document.text, of=copy["of"],
                    )  # fmt: skip
                    rejected.append({"n": row["n"], **reason})
                elif score is not None and score < self._threshold:
                    detail = f"score {score:.3g}, threshold {self._threshold:.3g}"
                    reason = rejection(document, "classifier", "low_score", detail, document.text, score=score)
                    rejected.append({"n": row["n"], **reason})
                else:
                    file.write(_line({k: v for k, v in row.items() if k != "n"}))
                    counts[f"{group_of(document.source)}|kept|"] += 1
        for row in rejected:
            counts[f"{group_of(row['source'])}|{row['stage']}|{row['reason']}"] += 1
        rejected.sort(key=lambda row: row["n"])
        lines = (_line({k: v for k, v in row.items() if k != "n"}) for row in rejected)
        with replacing(paths[1]) as out, open(out, "wb") as file:
            file.writelines(lines)
        content = {"counts": dict(sorted(counts.items())), "scores": scores if self.settings.classifier else None}
        write_record(record_path, paths, content, self.folder)
        return finished(record_path, self.folder) or {}

    @property
    def _classifier(self) -> Classifier:
        assert self.settings.classifier is not None
        return _classifier(self.settings.classifier, self.classifier_sha256)

    @property
    def _threshold(self) -> float:
        return self._classifier.threshold if self.settings.threshold is None else self.settings.threshold

    def _scored(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The rows with the classifier's score, 64 at a time; as they are, if there is none."""
        if self.settings.classifier is None:
            yield from rows
            return
        batch: list[dict[str, Any]] = []
        for row in rows:
            batch.append(row)
            if len(batch) == 64:
                yield from self._score_batch(batch)
                batch = []
        yield from self._score_batch(batch)

    def _score_batch(self, batch: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        scores = self._classifier.score([row["text"] for row in batch])
        return ({**row, "score": round(score, 6)} for row, score in zip(batch, scores, strict=True))


@lru_cache(maxsize=1)
def _contamination(against: tuple[str, ...], limit: float) -> Contamination:
    """Read once a process, not once a shard."""
    return Contamination(read_items(against), limit)


@lru_cache(maxsize=1)
def _classifier(folder: str, sha256: str | None) -> Classifier:
    """Loaded once a process; the hash keeps a replaced model from being taken for the old one."""
    return Classifier(folder)


def rejection(
    item: Document | Unread, stage: str, reason: str, detail: str, text: str, **more: Any
) -> dict[str, Any]:
    """A row of rejected.jsonl: id, source, stage, reason, the numbers behind it, and the beginning of the text."""
    excerpt = text[:EXCERPT] + ("…" if len(text) > EXCERPT else "")
    return {
        "id": item.id, "source": item.source, "stage": stage, "reason": reason, "detail": detail, **more,
        "characters": len(text), "excerpt": excerpt,
    }  # fmt: skip


def group_of(source: str) -> str:
    """The input and the folder directly below it: what counts are kept by."""
    parts = source.split("/")
    return "/".join(parts[:2]) if len(parts) > 2 else parts[0]


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for line in file:
            yield json.loads(line)


def clean(
    inputs: Sequence[str | Path],
    out: str | Path,
    settings: CleanSettings | None = None,
    workers: int = 1,
    runner: Runner = run_shards,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Clean the inputs into the folder `out` and return the manifest; a begun run goes on where it was.

    Kept documents are `out/kept/*.jsonl` (id, source, text, and a score if there is a classifier), with their text as
    it was read; the rest is `out/rejected/*.jsonl` with reasons; `out/report.html` shows counts and samples. `runner`
    carries out the shards, `workers` at a time: processes of this machine, or `cluster.run_shards_on_ray`.

    Raises ValueError if `out` holds a run with other settings or other input, RuntimeError if another run is at work
    there, or if a worker fails.
    """
    out, settings = Path(out).resolve(), settings or CleanSettings()
    with locked(out):
        report("hashing the input")
        plan = make_plan(inputs, settings.shard_bytes)
        if not plan.shards:
            raise ValueError(f"{[str(one) for one in inputs]}: expected at least one file to clean")
        beginning: dict[str, Any] = {
            "settings": asdict(settings),
            "against": [[f["source"], f["sha256"]] for f in make_plan(settings.against).files],
            "classifier_sha256": sha256_of(Path(settings.classifier) / "model.bin") if settings.classifier else None,
            "inputs": list(plan.files),
        }
        check_manifest(out / "begun.json", beginning)
        for part in ("work", "kept", "rejected"):
            (out / part).mkdir(exist_ok=True)
        cleaner = Cleaner(out, settings, plan, beginning["classifier_sha256"])
        numbers = range(len(plan.shards))
        report(f"reading, rules, decontamination: {len(numbers)} shards")
        runner(cleaner.prepare, numbers, workers, lambda number, record: None)
        report("duplicates")
        mark_duplicates(cleaner.work, len(numbers), settings)
        report("classifier, and the result")
        records: dict[int, dict[str, Any]] = {}
        runner(cleaner.finish, numbers, workers, records.__setitem__)
        manifest = _manifest(beginning, [records[number] for number in numbers], cleaner)
        write_text(out / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        write_report(out, manifest)
    return manifest


def _manifest(beginning: dict[str, Any], records: list[dict[str, Any]], cleaner: Cleaner) -> dict[str, Any]:
    """Everything about the result that another run of the same input must give again."""
    groups: dict[str, Counter[str]] = {}
    stages: dict[str, Counter[str]] = {}
    for record in records:
        for key, count in record["counts"].items():
            group, stage, reason = key.rsplit("|", 2)
            groups.setdefault(group, Counter())[stage] += count
            stages.setdefault(stage, Counter())[reason] += count
    kept = sum(stages.pop("kept", Counter()).values())
    rejected = {stage: dict(sorted(reasons.items())) for stage, reasons in sorted(stages.items())}
    settings = cleaner.settings
    scores = [record["scores"] for record in records if record["scores"]]
    return {
        **beginning,
        "versions": versions(),
        "documents": kept + sum(sum(reasons.values()) for reasons in rejected.values()),
        "kept": kept,
        "rejected": rejected,
        "groups": {group: dict(sorted(counter.items())) for group, counter in sorted(groups.items())},
        "clusters": clusters(cleaner, {group: counter.total() for group, counter in groups.items()}),
        "too_short_to_match": cleaner.contamination.too_short if settings.against else [],
        "threshold": cleaner._threshold if settings.classifier else None,
        "scores": [sum(column) for column in zip(*scores, strict=True)] if scores else None,
        "files": {name: file for record in records for name, file in record["files"].items()},
    }


def clusters(cleaner: Cleaner, totals: Mapping[str, int], count: int = 20) -> list[dict[str, Any]]:
    """The largest groups of duplicates: the kept one, how many it stands for, and the groups of files that they are
    most of (a sign that a rule, a template or the threshold should be looked at)."""
    sizes: Counter[str] = Counter()
    sources: dict[str, Counter[str]] = {}
    for number in range(len(cleaner.plan.shards)):
        for row in _rows(cleaner.folder / "rejected" / f"{number:05d}.jsonl"):
            if row["stage"] == "duplicates":
                sizes[row["of"]] += 1
                sources.setdefault(row["of"], Counter())[group_of(row["source"])] += 1
    result = []
    for kept, removed in sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0]))[:count]:
        most = [group for group, n in sorted(sources[kept].items()) if n > totals[group] / 2 and n >= 10]
        result.append({"kept": kept, "removed": removed, "most_of": most})
    return result
