"""Exact and near duplicates: MinHash finds the pairs worth a look, the true Jaccard value decides.

The problem: half of a crawl is copies, and comparing every document with every other is quadratic.
The idea: two sets have the same minimum under a random order of all elements with a probability equal to their Jaccard
value J. `rows` such minima together agree with probability J^rows; of `bands` groups at least one agrees with
1 - (1 - J^rows)^bands (`candidate_probability`), a curve that is flat, then steep, then flat. So only documents that
share a band are compared, and they are compared exactly, on their sets of shingles (runs of five words).

Which one survives: the first in the order of the input. A later document goes if its Jaccard value with a *kept* one
reaches the threshold, and the verdict names that one and the value. So chains do not merge what is not alike (A like B,
B like C, but A unlike C: A and C stay), which connected components of candidate pairs would.

A text shorter than a shingle is one shingle. The hashes are exact integer arithmetic that is meant to wrap, the same on
every machine and in every process: BLAKE2 of each word, a polynomial of five words modulo 2^64, then datasketch's
affine permutations modulo 2^64. The band table lies in SQLite, on disk: memory does not grow with the corpus.

Sources: Broder, On the resemblance and containment of documents, 1997; Leskovec, Rajaraman, Ullman, Mining of Massive
Datasets, chapter 3 (bands and rows).
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from minicpm_ref.files import write_text
from minicpm_ref.ultraclean.normalise import words_of
from minicpm_ref.ultraclean.records import finished, write_record

Hashes = NDArray[np.uint64]
_BASE = 0x9E3779B97F4A7C15  # an odd number with well-mixed bits: the base of the polynomial


def candidate_probability(similarity: Tensor, bands: int, rows: int) -> Tensor:
    """Probability that two documents share a band, for Jaccard values [...] in [0, 1]: 1 - (1 - s^rows)^bands.

    >>> candidate_probability(torch.tensor([0.5, 0.8]), bands=14, rows=8)
    tensor([0.0533, 0.9237])
    """
    return 1 - (1 - similarity**rows) ** bands


def jaccard(a: Hashes, b: Hashes) -> float:
    """Size of the intersection over size of the union of two sorted sets; 0 of two empty ones."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common) if len(a) + len(b) else 0.0


@lru_cache(maxsize=1 << 17)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def shingles(text: str, n: int = 5) -> Hashes:
    """The set of hashes of all runs of `n` words of a text, sorted; a shorter text is one run, no word none."""
    words = words_of(text)
    if not words:
        return np.empty(0, np.uint64)
    hashes = np.array([_word_hash(word) for word in words], dtype=np.uint64)
    size = min(n, len(hashes))
    rolled = np.full(len(hashes) - size + 1, size, dtype=np.uint64)
    for i in range(size):  # a polynomial modulo 2^64: the product is meant to wrap
        rolled = rolled * np.uint64(_BASE) + hashes[i : len(hashes) - size + 1 + i]
    return np.unique(rolled)


@cache
def _empty_sketch(permutations: int):  # type: ignore[no-untyped-def]  # datasketch.MinHash, which is an extra
    from datasketch import MinHash

    return MinHash(num_perm=permutations, seed=1, scheme="affine64", hashfunc=int)


def signature(hashes: Hashes, permutations: int) -> Hashes:
    """The minima of a set under `permutations` random orders of all 64-bit numbers, [permutations]."""
    sketch = _empty_sketch(permutations).copy()
    for start in range(0, len(hashes), 4096):  # one table of 4096 x permutations at a time
        sketch.update_batch(hashes[start : start + 4096].tolist())
    return sketch.hashvalues


def band_keys(minima: Hashes, bands: int, rows: int) -> list[int]:
    """One signed 64-bit key a band, of its number and its `rows` minima."""
    table = np.ascontiguousarray(minima[: bands * rows], dtype="<u8").reshape(bands, rows)
    return [
        int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8, salt=bytes([band])).digest(), signed=True)
        for band, row in enumerate(table)
    ]


class Verdict(NamedTuple):
    """Why a document goes: the kept one that it duplicates, their Jaccard value, and `exact` or `near`."""

    of: int
    jaccard: float
    kind: str


class DuplicateIndex:
    """What has been kept so far, on disk. Ask about documents in the order of the input; each is a number.

    `text_of(number)` must give the text of a kept document back; a candidate is compared on its words. The caller opens
    and commits transactions on `db`: what lies between is either all written or not at all, also under kill -9.
    """

    def __init__(
        self, path: Path, text_of: Callable[[int], str], threshold: float, bands: int, rows: int, n: int = 5
    ):
        self.threshold, self.bands, self.rows, self.n = threshold, bands, rows, n
        self._shingles = lru_cache(maxsize=2048)(lambda number: shingles(text_of(number), n))
        self.db = sqlite3.connect(path, isolation_level=None)
        self.db.execute("PRAGMA cache_size = -65536")  # 64 MB, whatever the size of the corpus
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = NORMAL")
        self.db.execute("CREATE TABLE IF NOT EXISTS exact (digest BLOB PRIMARY KEY, document INTEGER) WITHOUT ROWID")
        bands_columns = "key INTEGER, document INTEGER, PRIMARY KEY (key, document)"
        self.db.execute(f"CREATE TABLE IF NOT EXISTS bands ({bands_columns}) WITHOUT ROWID")

    def judge(self, number: int, text: str, minima: Hashes) -> Verdict | None:
        """A verdict if the document duplicates a kept one; otherwise it is kept and remembered, and the answer None.

        Among several kept ones the most similar is named, and of equals the first.
        """
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        same = self.db.execute("SELECT document FROM exact WHERE digest = ?", (digest,)).fetchone()
        if same:
            return Verdict(same[0], 1.0, "exact")
        own = shingles(text, self.n)
        keys = band_keys(minima, self.bands, self.rows) if len(own) else []
        best: Verdict | None = None
        for candidate in sorted(self._candidates(keys)):
            value = jaccard(own, self._shingles(candidate))
            if value >= self.threshold and (best is None or value > best.jaccard):
                best = Verdict(candidate, value, "near")
        if best is None:
            self.db.execute("INSERT INTO exact VALUES (?, ?)", (digest, number))
            self.db.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", [(key, number) for key in keys])
        return best

    def _candidates(self, keys: Sequence[int]) -> set[int]:
        marks = ",".join("?" * len(keys))
        rows = self.db.execute(f"SELECT document FROM bands WHERE key IN ({marks})", list(keys))
        return {row[0] for row in rows}

    def close(self) -> None:
        """Close the file."""
        self.db.close()


class DuplicateSettings(Protocol):
    """What `mark_duplicates` reads of `pipeline.CleanSettings`."""

    @property
    def near_threshold(self) -> float: ...
    @property
    def bands(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def shingle_words(self) -> int: ...


def mark_duplicates(work: Path, shards: int, settings: DuplicateSettings) -> None:
    """For every shard that `prepare` left in `work`, write which survivors duplicate something kept before them.

    One process, in the order of the input. A line of NNNNN.duplicates.jsonl: number of the survivor, id of the kept
    one, Jaccard value, kind.
    """
    if all(finished(work / f"{shard:05d}.duplicates.json") is not None for shard in range(shards)):
        return

    def text_of(number: int) -> str:
        query = "SELECT shard, offset FROM places WHERE document = ?"
        shard, offset = index.db.execute(query, (number,)).fetchone()
        with open(work / f"{shard:05d}.survivors.jsonl", "rb") as file:
            file.seek(offset)
            return str(json.loads(file.readline())["text"])

    index = DuplicateIndex(
        work / "kept_so_far.sqlite", text_of,
        settings.near_threshold, settings.bands, settings.rows, settings.shingle_words,
    )  # fmt: skip
    places = "document INTEGER PRIMARY KEY, shard INTEGER, offset INTEGER, id TEXT"
    index.db.execute(f"CREATE TABLE IF NOT EXISTS places ({places})")
    index.db.execute("CREATE TABLE IF NOT EXISTS done (shard INTEGER PRIMARY KEY, lines TEXT)")
    for shard in range(shards):
        stored = index.db.execute("SELECT lines FROM done WHERE shard = ?", (shard,)).fetchone()
        if stored is None:  # one transaction a shard: the index holds whole shards, with what was found in them
            index.db.execute("BEGIN")
            lines = "".join(_judge_shard(index, work, shard, settings.bands * settings.rows))
            index.db.execute("INSERT INTO done VALUES (?, ?)", (shard, lines))
            index.db.execute("COMMIT")
        path = work / f"{shard:05d}.duplicates.jsonl"
        write_text(path, lines if stored is None else stored[0])
        write_record(work / f"{shard:05d}.duplicates.json", [path], {})
    index.close()


def _judge_shard(index: DuplicateIndex, work: Path, shard: int, width: int) -> Iterator[str]:
    """The lines of a shard's duplicates; kept survivors are entered in the index with the place of their text."""
    with (
        open(work / f"{shard:05d}.survivors.jsonl", "rb") as texts,
        open(work / f"{shard:05d}.signatures", "rb") as minima,
    ):
        offset = 0
        for raw in texts:
            row = json.loads(raw)
            number = (shard << 32) + row["n"]  # unique, and in the order of the input
            verdict = index.judge(number, row["text"], np.frombuffer(minima.read(8 * width), "<u8"))
            if verdict is None:
                index.db.execute("INSERT INTO places VALUES (?, ?, ?, ?)", (number, shard, offset, row["id"]))
            else:
                (of,) = index.db.execute("SELECT id FROM places WHERE document = ?", (verdict.of,)).fetchone()
                found = {"n": row["n"], "of": of, "jaccard": round(verdict.jaccard, 4), "kind": verdict.kind}
                yield json.dumps(found, ensure_ascii=False) + "\n"
            offset += len(raw)
