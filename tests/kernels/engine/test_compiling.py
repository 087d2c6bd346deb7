"""What is compiled is thrown away when a file changes, and does without a folder to keep it in; and each CPU gets the
best that it can run."""

from __future__ import annotations

import shutil
from pathlib import Path

import numba
from numba import int64

import minicpm_kernels.engine.compiling as compiling
from minicpm_kernels.engine.instruction_sets import INSTRUCTION_SETS, supported


def test_the_best_instruction_set_of_a_cpu_is_taken(monkeypatch) -> None:
    for features, expected in (
        ("+avx512f,+avx512bw,+avx512vnni,+f16c,+avx2,+fma", list(INSTRUCTION_SETS)),
        ("+avx512f,+avx512bw,+f16c,+avx2,+fma", ["avx2", "portable"]),
        ("+avx2,+f16c", ["portable"]),
        ("", ["portable"]),
    ):
        monkeypatch.setattr(numba.config, "CPU_FEATURES", features)
        assert supported() == expected


def test_an_edited_file_is_compiled_anew(tmp_path: Path, monkeypatch) -> None:
    """numba looks at one file only; the name of a function changes with all of them."""
    room = tmp_path / "engine"
    shutil.copytree(Path(compiling.__file__).parent, room, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(compiling, "__file__", str(room / "compiling.py"))
    compiling.digest.cache_clear()
    before = compiling.digest()
    helper = room / "llvm.py"
    helper.write_text(helper.read_text() + "\n", "utf-8")
    compiling.digest.cache_clear()
    assert compiling.digest() != before
    monkeypatch.undo()
    compiling.digest.cache_clear()
    assert compiling.digest() == before


def test_a_read_only_installation_compiles_without_a_cache(monkeypatch) -> None:
    from numba.core import caching

    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    monkeypatch.setattr(compiling, "WORTH_SAYING", 0.0)
    lines: list[str] = []
    with compiling.reporting(lines.append):
        twice = compiling.compile_function("twice", int64(int64), lambda x: 2 * x)
        half = compiling.compile_address("half", int64(int64), lambda x: x // 2)
    assert twice(21) == half.ctypes(84) == 42
    assert [line.split(":")[0] for line in lines] == ["twice", "half"]
