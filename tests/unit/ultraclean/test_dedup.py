"""Duplicates: the curve, the true Jaccard value, chains, short texts, and hashes that are the same everywhere."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from minicpm_ref.ultraclean.dedup import (
    DuplicateIndex,
    Verdict,
    band_keys,
    candidate_probability,
    jaccard,
    shingles,
    signature,
)
from minicpm_ref.ultraclean.planted import WORDS, near_copy

BANDS, ROWS = 14, 8


def judge_all(texts: list[str], folder: Path, threshold: float = 0.8) -> list[Verdict | None]:
    index = DuplicateIndex(folder / "index.sqlite", texts.__getitem__, threshold, BANDS, ROWS)
    verdicts = [index.judge(i, text, signature(shingles(text), BANDS * ROWS)) for i, text in enumerate(texts)]
    index.close()
    return verdicts


def kept(texts: list[str], folder: Path, threshold: float = 0.8) -> list[str]:
    return [text for text, verdict in zip(texts, judge_all(texts, folder, threshold), strict=True) if verdict is None]


def random_text(rng: random.Random, words: int) -> str:
    return " ".join(f"{rng.choice(WORDS)}{rng.randrange(100)}" for _ in range(words))


def test_texts_shorter_than_a_shingle_are_one_shingle(tmp_path: Path) -> None:
    assert kept(["cat", "dog", "cat"], tmp_path) == ["cat", "dog"]


@pytest.mark.parametrize("unit", ["word{} ", "{}"])
@pytest.mark.parametrize("length", [1, 4, 5, 6])
def test_short_texts_twice_and_once_changed(tmp_path: Path, unit: str, length: int) -> None:
    characters = "一二三四五六七八"
    text = "".join(unit.format(characters[i]) for i in range(length))
    changed = text.replace(characters[0], "九", 1)
    assert kept([text, text, changed], tmp_path) == [text, changed]


def test_empty_texts_are_exact_duplicates_only(tmp_path: Path) -> None:
    verdicts = judge_all(["", "", " ", "..."], tmp_path)
    assert [verdict and verdict.kind for verdict in verdicts] == [None, "exact", None, None]


def test_the_curve() -> None:
    found = candidate_probability(torch.tensor([0.5, 0.7, 0.8, 0.9], dtype=torch.float64), 14, 8)
    assert found.tolist() == pytest.approx([0.053, 0.564, 0.924, 0.9996], abs=6e-4)
    assert candidate_probability(torch.tensor(0.8), 60, 13).item() == pytest.approx(0.966, abs=6e-4)


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
def test_found_shares_follow_the_curve(similarity: float) -> None:
    """300 pairs of sets at this exact Jaccard value share a band as often as the curve says (3 standard errors)."""
    rng = np.random.default_rng(0)
    union, pairs, found = 200, 300, 0
    common = round(similarity * union)
    for _ in range(pairs):
        elements = rng.integers(0, 2**64, union, dtype=np.uint64)
        half = common + (union - common) // 2
        a, b = elements[:half], np.concatenate([elements[:common], elements[half:]])
        assert jaccard(np.unique(a), np.unique(b)) == similarity
        keys = [set(band_keys(signature(one, BANDS * ROWS), BANDS, ROWS)) for one in (a, b)]
        found += bool(keys[0] & keys[1])
    expected = candidate_probability(torch.tensor(similarity, dtype=torch.float64), BANDS, ROWS).item()
    assert abs(found / pairs - expected) <= 3 * math.sqrt(max(expected * (1 - expected), 1 / pairs) / pairs)


def test_whatever_goes_reaches_the_threshold_with_a_kept_one(tmp_path: Path) -> None:
    rng = random.Random(0)
    originals = [random_text(rng, 150) for _ in range(30)]
    texts = originals + [near_copy(text, rng.choice([0.005, 0.02, 0.05, 0.1]), i) for i, text in enumerate(originals)]
    verdicts = judge_all(texts, tmp_path)
    removed = 0
    for i, verdict in enumerate(verdicts):
        if verdict is not None:
            removed += 1
            assert verdicts[verdict.of] is None, "the one that is named was kept"
            true = jaccard(shingles(texts[i]), shingles(texts[verdict.of]))
            assert true == verdict.jaccard >= 0.8
    assert 5 < removed < 30


def test_a_chain_does_not_merge_its_ends(tmp_path: Path) -> None:
    """Ten texts, each like the one before it: nothing goes that is unlike everything kept."""
    rng = random.Random(1)
    words = random_text(rng, 300).split()
    chain = []
    for i in range(10):
        chain.append(" ".join(words))
        for j in range(6):
            words[(i * 6 + j) * 5 % 300] = f"new{i}{j}"
    verdicts = judge_all(chain, tmp_path)
    neighbours = [jaccard(shingles(a), shingles(b)) for a, b in zip(chain, chain[1:], strict=False)]
    assert min(neighbours) >= 0.8
    assert jaccard(shingles(chain[0]), shingles(chain[-1])) < 0.5
    assert 2 <= sum(verdict is None for verdict in verdicts) < 10, "connected components would keep a single one"


def test_one_template_with_different_contents_stays(tmp_path: Path) -> None:
    rng = random.Random(2)
    frame = random_text(rng, 40)
    texts = [f"{frame} {random_text(rng, 60)} {frame}" for _ in range(200)]
    assert len(kept(texts, tmp_path)) == 200


def test_arithmetic_is_exact_at_the_extremes() -> None:
    """The polynomial of the shingles and the permutations against Python's own integers."""
    from datasketch import MinHash

    sketch = MinHash(num_perm=112, seed=1, scheme="affine64", hashfunc=int)
    a, b = sketch.permutations
    for value in (0, 1, 2**32 - 1, 2**61 - 2, 2**64 - 1):
        mixed = value  # the finaliser of MurmurHash3
        for shift, factor in ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53), (33, 1)):
            mixed = (mixed ^ mixed >> shift) * factor % 2**64
        expected = [(int(x) * mixed + int(y)) % 2**64 for x, y in zip(a, b, strict=True)]
        assert signature(np.array([value], np.uint64), 112).tolist() == expected


def test_signatures_are_equal_in_every_process() -> None:
    code = (
        "from minicpm_ref.ultraclean.dedup import shingles, signature, band_keys\n"
        "print(band_keys(signature(shingles('a b c d e f g 你好 ' * 3), 112), 14, 8))"
    )
    env = os.environ | {"PYTHONHASHSEED": "12345"}  # this process has another
    other = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    ours = band_keys(signature(shingles("a b c d e f g 你好 " * 3), 112), 14, 8)
    assert other.stdout == f"{ours}\n"
