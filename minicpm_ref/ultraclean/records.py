"""What is finished, and under which settings: records that a killed run can trust.

The problem: a run that resumes by the existence of a file takes what was begun for done, and one that does not compare
its settings mixes two runs.
The idea: every step writes its files first (each renamed into place) and its record last; the record holds size and
hash of each file, and a step is done only if they still agree. The run's manifest holds settings and input; a call with
others stops and names the first that differs. A lock, which the system takes back when a process dies, keeps a second
live run out.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from minicpm_ref.files import write_text
from minicpm_ref.ultraclean.documents import sha256_of

LIBRARIES = ("datasketch", "fasttext-community", "numpy", "pyarrow", "tokenizers")


def write_record(path: Path, files: list[Path], content: Mapping[str, Any], folder: Path | None = None) -> None:
    """Write `content` with name, size and hash of the finished `files`: the last act of a step.

    Names are relative to the record's folder, or to `folder`.
    """
    listed = {
        file.relative_to(folder or path.parent).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in files
    }
    write_text(path, json.dumps({**content, "files": listed}, indent=1, ensure_ascii=False) + "\n")


def finished(path: Path, folder: Path | None = None) -> dict[str, Any] | None:
    """The record of a finished step, or None if there is none or one of its files is not as it was written.

    The files lie beside the record, or in `folder`.
    """
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text("utf-8"))
    for name, expected in record["files"].items():
        file = (folder or path.parent) / name
        if not file.is_file() or file.stat().st_size != expected["bytes"] or sha256_of(file) != expected["sha256"]:
            return None
    return record


def check_manifest(path: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of a new run, or compare it with what a begun one was started with.

    Raises ValueError that names the first entry that differs, with both values.
    """
    wanted = json.loads(json.dumps(content))
    if not path.is_file():
        write_text(path, json.dumps(wanted, indent=1, ensure_ascii=False) + "\n")
        return
    found = json.loads(path.read_text("utf-8"))
    for name, value in wanted.items():
        difference = _difference(name, found.get(name), value)
        if difference:
            raise ValueError(f"{path.parent} was begun with {difference}; use another folder, or the same settings")


def _difference(name: str, before: Any, now: Any) -> str | None:
    """The first difference of two JSON values, in words."""
    if before == now:
        return None
    if isinstance(before, dict) and isinstance(now, dict):
        keys = (key for key in {**before, **now} if before.get(key) != now.get(key))
        key = next(keys)
        return _difference(f"{name}.{key}", before.get(key), now.get(key))
    if isinstance(before, list) and isinstance(now, list):
        for i, (one, other) in enumerate(zip(before, now, strict=False)):
            if one != other:
                return _difference(f"{name}[{i}]", one, other)
        return f"{len(before)} entries of {name}, now {len(now)}"
    return f"{name} = {before!r}, now {now!r}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; remove what killed writers left there. Raises RuntimeError if another run holds
    it."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RuntimeError(f"{folder}: another run is at work there; wait for it, or use another folder") from None
    try:
        for leftover in folder.rglob(".*.tmp"):
            leftover.unlink()
        yield
    finally:
        lock.release()


def versions() -> dict[str, str]:
    """Versions of what the result depends on; a library that is not installed is not named."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an extra that this run does not use
    return found
