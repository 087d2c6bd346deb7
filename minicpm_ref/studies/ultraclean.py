"""Does UltraClean find what was planted, and does training notice? Four parts, one file of results.

- `planted`: junk of eight kinds among real files: recall of each kind, precision of each rule.
- `duplicates`: copies with changed words among files: what was found and merged, against the exact Jaccard value of
  every pair.
- `training`: small models from scratch on as many tokens of the raw, the rule-filtered and the classifier-filtered
  pool.
- `loop`: two rounds on the same pool, verified by annealing the embedded base from its stable phase.

The pool: source files of this machine (train split), a quarter as many planted junk files, half as many files with
their words shuffled (which no rule can see), and copies. The verified seeds are files that are not in the pool. Truth
for the rules: a real file counts as good unless it lies in a folder of tables, generated code or test data (`POOR`).
The limits for code were set while looking at files of these groups and at these generators, so recall and precision are
those of a fitted filter; other people's data will be harder.

Budgets are small (see `settings` in the results): the runs say which mixture is better, not how good a model gets.
Run: python -m minicpm_ref.studies.ultraclean CORPUS SCRATCH
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from minicpm_ref.config import ModelConfig
from minicpm_ref.data import Corpus, Document, find_roots, read_documents, small_sample
from minicpm_ref.evaluate import bits_per_byte
from minicpm_ref.files import write_text
from minicpm_ref.studies.record import Record
from minicpm_ref.training import Recipe, Trainer
from minicpm_ref.ultraclean import ClassifierSettings, CleanSettings, apply_rules, clean, jaccard, shingles
from minicpm_ref.ultraclean.dedup import DuplicateIndex, signature
from minicpm_ref.ultraclean.documents import Document as PoolDocument
from minicpm_ref.ultraclean.loop import LoopSettings, draw, run_loop
from minicpm_ref.ultraclean.planted import KINDS, near_copy, plant, word_salad
from minicpm_ref.ultraclean.verify import VerifySettings, decide, default_corpus

GROUPS = ("stdlib", "networkx")
POOR = ("encodings/", "test/", "tests/", "lib2to3/", "pydoc_data/", "idlelib/idle_test/", "turtledemo/", "ensurepip/")
PROXY = ModelConfig(4096, 128, 2, 4, 1, 384, max_position_embeddings=512)
SETTINGS: dict[str, Any] = {
    "groups": GROUPS,
    "poor": POOR,
    "planted": {"real": 300, "junk_of_each_kind": 50},
    "duplicates": {"originals": 150, "changed_words": [0.003, 0.01, 0.02, 0.03, 0.05, 0.1], "threshold": 0.8},
    "pool": {"real": 300, "junk": 80, "salad": 150, "copies": 30, "seeds": 150},
    "training": {"tokens": 81_920, "context": 256, "batch_tokens": 2048, "seeds": [0, 1, 2]},
}
LOOP = LoopSettings(
    rounds=2, seeds=150, candidate_tokens=400_000, classifier=ClassifierSettings(),
    verify=VerifySettings(tokens=16_384, context=256, batch_tokens=2048, seeds=(0, 1, 2), held_out_bytes=50_000),
)  # fmt: skip


def real_files(good: bool) -> list[PoolDocument]:
    """Training files of this machine that are (or are not) outside the poor folders, in the order of a hash."""
    found = []
    for group, root in find_roots(GROUPS).items():
        for document in read_documents(group, root):
            if not document.held_out and 1500 <= document.nbytes <= 60_000 and is_poor(document) != good:
                found.append(PoolDocument(f"{group}/{document.path}", group, document.text))
    return draw(iter(found), len(found), "ultraclean study")


def is_poor(document: Document) -> bool:
    """Whether a file lies in a folder of tables, generated code or test data."""
    return any(part in document.path for part in POOR)


def measure_planted(count: int, of_each: int) -> dict[str, Any]:
    """Recall of each kind and precision of each rule, on real files and planted ones."""
    reasons: dict[str, Counter[str]] = {"real": Counter()}
    wrong = []
    for document in real_files(good=True)[:count]:
        verdict = apply_rules(document.text)
        reasons["real"][verdict[0] if verdict else "kept"] += 1
        if verdict:
            wrong.append([document.id, *verdict])
    for kind in KINDS:
        verdicts = (apply_rules(plant(kind, 10_000 + i)) for i in range(of_each))
        reasons[kind] = Counter(verdict[0] if verdict else "kept" for verdict in verdicts)
    found = {kind: of_each - reasons[kind]["kept"] for kind in KINDS}
    planted = Counter[str]()
    for kind in KINDS:
        planted.update({rule: n for rule, n in reasons[kind].items() if rule != "kept"})
    rejected_real = count - reasons["real"]["kept"]
    poor = Counter((apply_rules(d.text) or ("kept",))[0] for d in real_files(good=False)[:count])
    return {
        "recall": {kind: found[kind] / of_each for kind in KINDS},
        "recall_for_the_right_reason": {k: sum(reasons[k][r] for r in KINDS[k][1]) / of_each for k in KINDS},
        "precision": sum(found.values()) / (sum(found.values()) + rejected_real),
        "precision_of_rules": {r: n / (n + reasons["real"][r]) for r, n in sorted(planted.items())},
        "real_files": count,
        "real_files_rejected": wrong,
        "files_of_poor_folders": dict(poor),
    }


def measure_duplicates(originals: int, shares: Sequence[float], threshold: float) -> dict[str, Any]:
    """What the index finds among originals and copies, against the exact value of every pair."""
    texts = [document.text for document in real_files(good=True)[:originals]]
    texts += [near_copy(text, shares[i % len(shares)], i) for i, text in enumerate(texts)]
    sets = [shingles(text) for text in texts]
    values = {pair: jaccard(sets[pair[0]], sets[pair[1]]) for pair in combinations(range(len(texts)), 2)}
    alike = {pair for pair, value in values.items() if value >= threshold}
    with tempfile.TemporaryDirectory() as folder:
        index = DuplicateIndex(Path(folder) / "index.sqlite", texts.__getitem__, threshold, 14, 8)
        verdicts = [index.judge(i, text, signature(sets[i], 112)) for i, text in enumerate(texts)]
        index.close()
    kept = {i for i, verdict in enumerate(verdicts) if verdict is None}
    should_go = {j for i, j in alike if i in kept}
    gone = {i for i, verdict in enumerate(verdicts) if verdict is not None}
    false_merges = sum(v is not None and values[(v.of, i)] < threshold for i, v in enumerate(verdicts))
    bins: dict[str, list[int]] = {}
    for i in range(originals, len(texts)):
        place = f"{min(int(values[(i - originals, i)] * 20), 19) / 20:.2f}"
        counts = bins.setdefault(place, [0, 0])
        counts[0] += i in gone
        counts[1] += 1
    return {
        "documents": len(texts), "pairs": len(values), "pairs_at_the_threshold": len(alike),
        "recall": len(gone & should_go) / max(1, len(should_go)), "should_go": len(should_go), "gone": len(gone),
        "false_merges": false_merges, "gone_and_all_by_jaccard_value": dict(sorted(bins.items())),
    }  # fmt: skip


def write_pool(folder: Path, real: int, junk: int, salad: int, copies: int, seeds: int) -> tuple[Path, Path]:
    """The raw pool and the verified seeds as JSONL; ids tell what a document is."""
    good, poor = real_files(good=True), real_files(good=False)
    files = [*good[: real * 3 // 4], *poor[: real // 4]]
    rest = good[real * 3 // 4 :]
    rows = [(f"real {d.id}", d.text) for d in files]
    rows += [(f"junk {kind} {i}", plant(kind, i)) for i, kind in zip(range(junk), 999 * list(KINDS), strict=False)]
    rows += [(f"salad {d.id}", word_salad(d.text, i)) for i, d in enumerate(rest[seeds : seeds + salad])]
    rows += [(f"copy {d.id}", near_copy(d.text, 0.01, i)) for i, d in enumerate(files[:copies])]
    rows += [(f"salad {d.id} 2", word_salad(d.text, i)) for i, d in enumerate(files[: seeds + salad - len(rest)])]
    paths = folder / "raw.jsonl", folder / "verified.jsonl"
    for path, lines in zip(paths, (rows, [(d.id, d.text) for d in rest[:seeds]]), strict=True):
        if not path.exists():
            write_text(path, "".join(json.dumps({"id": n, "text": t}, ensure_ascii=False) + "\n" for n, t in lines))
    return paths


def texts_of(paths: Sequence[Path]) -> Iterator[str]:
    """Texts of JSONL files in the order of a hash of their ids."""
    documents = []
    for path in paths:
        with open(path, "rb") as file:
            documents += [PoolDocument(row["id"], "", row["text"]) for row in map(json.loads, file)]
    return (document.text for document in draw(iter(documents), len(documents), "order"))


def truth(path: Path) -> Counter[str]:
    """How many documents of each kind a JSONL file of the pool holds."""
    with open(path, "rb") as file:
        return Counter(json.loads(line)["id"].split(" ")[0] for line in file)


def measure(corpus: Corpus, scratch: Path, report: Callable[[str], None] = print, folder: Path | None = None) -> Record:
    """Run whatever part is missing and return the record; `folder` replaces figures/data."""
    record = Record("ultraclean", corpus, SETTINGS | {"loop": asdict(LOOP), "clean": asdict(CleanSettings())}, folder)
    for name, function in (("planted", measure_planted), ("duplicates", measure_duplicates)):
        if not record.part(name):
            record.part(name).update(function(*SETTINGS[name].values()))
            record.save()
            report(f"{name}: {json.dumps({k: v for k, v in record.part(name).items() if not isinstance(v, list)})}")
    scratch.mkdir(parents=True, exist_ok=True)
    raw, verified = write_pool(scratch, **SETTINGS["pool"])
    manifest = clean([raw], scratch / "cleaned")
    rules = sorted((scratch / "cleaned" / "kept").iterdir())
    default = default_corpus(scratch / "raw", texts_of([raw]), corpus)
    content = run_loop([verified], [scratch / "cleaned" / "kept"], default, scratch / "loop", LOOP, report)
    rounds = [{k: v for k, v in r.items() if k != "files"} for r in content["rounds"]]
    first = scratch / "loop" / "round_1" / "filtered.jsonl"
    record.part("loop").update(
        rounds=rounds, result=content["result"], cleaned={"kept": manifest["kept"], "rejected": manifest["rejected"]},
        pools={"raw": truth(raw), "rules": sum(map(truth, rules), Counter()), "classifier": truth(first)},
    )  # fmt: skip
    record.save()
    pools = {"raw": [raw], "rules": rules, "classifier": [first]}
    train(record, corpus, {name: list(paths) for name, paths in pools.items()}, scratch, report)
    return record


def train(
    record: Record, corpus: Corpus, pools: dict[str, list[Path]], scratch: Path, report: Callable[[str], None]
) -> None:
    """Train the proxy on each pool and seed, and judge the filtered pools against the raw one."""
    settings, runs = SETTINGS["training"], record.part("training").setdefault("held_out_bits_per_byte", {})
    texts = [document.text for document in small_sample(corpus.held_out, 50_000)]
    for seed in settings["seeds"]:
        for name, paths in pools.items():
            if str(seed) in runs.setdefault(name, {}):
                continue
            pool = default_corpus(scratch / name, texts_of(paths), corpus)
            recipe = Recipe(
                "proxy", PROXY, settings["tokens"], settings["context"], settings["batch_tokens"],
                warmup_tokens=10_000, seed=seed,
            )  # fmt: skip
            trainer = Trainer(recipe, pool, scratch / "unused")
            for _ in range(recipe.steps):
                trainer.train_step()
            model = trainer.whole_model()
            runs[name][str(seed)] = round(bits_per_byte(model, corpus.tokenizer, texts, recipe.context), 4)
            record.save()
            report(f"{name}, seed {seed}: {runs[name][str(seed)]} bits per byte")
    against = list(runs["raw"].values())
    record.part("training")["decisions"] = {
        name: asdict(decide(against, list(runs[name].values()))) for name in pools if name != "raw"
    }
    record.save()


if __name__ == "__main__":
    measure(Corpus(sys.argv[1]), Path(sys.argv[2]))
