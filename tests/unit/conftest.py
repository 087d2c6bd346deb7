"""What several unit tests share."""

from __future__ import annotations

import pytest

from minicpm_ref.data import Corpus, build_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    root = tmp_path_factory.mktemp("sources")
    for i in range(100):
        text = "".join(f"def function_{i}_{j}(first):\n    return first + {i * j}\n\n\n" for j in range(30))
        (root / f"module_{i}.py").write_text(text)
    return build_corpus(tmp_path_factory.mktemp("corpus"), {"stdlib": root}, vocab_size=480)
