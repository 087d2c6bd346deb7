"""The lane itself: what cannot run is skipped with its reason, and the two halves are the whole."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("numerics_lane", Path(__file__).with_name("lane.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_two_halves_are_all_settings_but_the_first(lane: ModuleType) -> None:
    even, odd = (lane.half(list(lane.SETTINGS), commit) for commit in ("1f2e", "1f2d"))
    assert sorted(s.name for s in [*even, *odd]) == sorted(s.name for s in lane.SETTINGS[1:])
    assert abs(len(even) - len(odd)) <= 1


def test_a_setting_means_itself_alone(lane: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Nehalem")
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+sse2")
    found = lane.environment(lane.Setting("mine", {"ATEN_CPU_CAPABILITY": "default"}))
    assert "OPENBLAS_CORETYPE" not in found
    assert "NUMBA_CPU_FEATURES" not in found
    assert (found["ATEN_CPU_CAPABILITY"], found["OMP_NUM_THREADS"]) == ("default", "1")


def test_machine_code_is_kept_apart(lane: ModuleType) -> None:
    pytest.importorskip("llvmlite")
    narrow = [setting for setting in lane.SETTINGS if setting.without]
    folders = {lane.environment(setting)["NUMBA_CACHE_DIR"] for setting in [*narrow, lane.SETTINGS[0]]}
    assert len(folders) == len(narrow) + 1
    for setting in narrow:
        features = lane.environment(setting)["NUMBA_CPU_FEATURES"].split(",")
        assert not any(name.startswith(tuple("+" + lost for lost in setting.without)) for name in features)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "dies of SIGILL: this processor lacks"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "dies of SIGSEGV"),
        ("raise ValueError('no such code')", "fails: ValueError: no such code"),
        ("raise SystemExit(3)", "fails: without a word"),
    ],
)
def test_what_cannot_run_says_why(
    lane: ModuleType, program: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text(program)
    monkeypatch.setattr(lane, "__file__", str(probe))
    result, why = lane.try_setting(lane.SETTINGS[1])
    assert result is None
    assert reason in why


def test_a_setting_that_changes_nothing_is_not_run_again(lane: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = {"threads-2": "other bits", "aten-avx2": None}
    answers = {name: ({"bits": found} if found else None, "" if found else "dies") for name, found in bits.items()}
    monkeypatch.setattr(lane, "try_setting", lambda setting: answers.get(setting.name, ({"bits": "usual"}, "")))
    settings, reasons = lane.available(workers=1)
    assert [setting.name for setting in settings] == ["threads-1", "threads-2"]
    assert reasons["aten-avx2"] == "dies"
    assert reasons["openblas-zen"] == "the same bits as threads-1"
    assert set(reasons) == {s.name for s in lane.SETTINGS} - {"threads-1", "threads-2"}
