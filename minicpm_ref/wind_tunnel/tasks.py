"""A run of the wind tunnel as a task: a function, its settings, a folder, and a record that says it is finished.

The problem: a sweep is a hundred runs, some of which fail, and it never ends in one sitting. What counts as done?
The idea: a task is named, its settings are plain JSON, and it writes only below its own folder. The record
`result.json` is written last (temporary name, then rename) and holds the settings and a hash of every file that the
run left, so a half-written run is never mistaken for a finished one, and a finished one is never repeated. Settings
that differ from those of the record stop the sweep and name the setting: two experiments never share a folder.

What a run cost (seconds, machine) stands in `cost.json` beside the record, so that the record itself depends on the
settings alone and is the same whoever ran the task: a process here, or a Ray worker elsewhere.

Left out: tasks that depend on other tasks. A stable run and the decays that branch off it are one task.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minicpm_ref.files import write_text
from minicpm_ref.machine import machine

RECORD, COST, LOG = "result.json", "cost.json", "log.txt"
_stop = threading.Event()


class Stopped(Exception):
    """A run that was asked to stop has saved its state and gone; the same task goes on from there later."""


def request_stop() -> None:
    """Ask the run in this process to save its state and stop after the step it is in."""
    _stop.set()


def stop_requested() -> bool:
    """True once `request_stop` was called: a long loop checks it, saves, and raises `Stopped`."""
    return _stop.is_set()


@dataclass(frozen=True)
class Task:
    """One independent run.

    `function` is "module:name" and is called as function(settings, folder, inputs). `settings` are plain JSON values
    and decide the result; `inputs` (of the whole sweep, such as where the corpus lies) do not. It returns plain JSON
    values; the names under its key "files" are files below `folder` that belong to the result. `processes` above 1
    starts the run through torchrun with that many processes.
    """

    name: str
    function: str
    settings: Mapping[str, Any]
    processes: int = 1

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", self.name):
            raise ValueError(f"task name {self.name!r}: expected letters, digits and . _ + - (it becomes a folder)")
        if self.function.count(":") != 1:
            raise ValueError(f"task {self.name}: function {self.function!r}, expected 'module:name'")

    def identity(self) -> dict[str, Any]:
        """What a record must say to be the record of this task."""
        return {"function": self.function, "settings": json.loads(json.dumps(self.settings))}


def finished(task: Task, folder: str | Path) -> dict[str, Any] | None:
    """The result of `task` recorded below `folder`, or None when it has yet to run (again).

    A record whose files are missing or changed counts as not finished. Raises ValueError when the record is that of
    other settings, naming them.
    """
    path = Path(folder) / task.name / RECORD
    if not path.is_file():
        return None
    record = json.loads(path.read_text("utf-8"))
    wanted = task.identity()
    if record["function"] != wanted["function"]:
        raise ValueError(f"{path}: recorded by {record['function']}, not {task.function}; use another folder")
    old, new = record["settings"], wanted["settings"]
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if changed:
        listed = ", ".join(f"{key} = {new.get(key)!r} (was {old.get(key)!r})" for key in changed)
        raise ValueError(f"{path} belongs to other settings: {listed}; use another folder, or the same settings")
    for name, digest in record["files"].items():
        file = path.parent / name
        if not file.is_file() or _sha256(file) != digest:
            return None
    result: dict[str, Any] = record["result"]
    return result


def execute(task: Task, folder: str | Path, inputs: Mapping[str, Any]) -> None:
    """Run `task` in this process and write its record. Raises whatever the function raises.

    Of several processes (torchrun) the first one writes.
    """
    where = Path(folder) / task.name
    where.mkdir(parents=True, exist_ok=True)
    module, _, name = task.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    begin, cpu = time.monotonic(), time.process_time()
    result = function(task.settings, where, inputs)
    if int(os.environ.get("RANK", 0)):
        return
    cost = {
        "seconds": round(time.monotonic() - begin, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    } | machine(torch.device("cpu"))
    write_text(where / COST, json.dumps(cost, indent=1) + "\n")
    files = {name: _sha256(where / name) for name in result.get("files", ())}
    record = task.identity() | {"result": result, "files": files}
    write_text(where / RECORD, json.dumps(record, indent=1) + "\n")


def cost_of(task: Task, folder: str | Path) -> dict[str, Any]:
    """What the finished `task` cost: "seconds", "cpu_seconds", "date" and the machine."""
    cost: dict[str, Any] = json.loads((Path(folder) / task.name / COST).read_text("utf-8"))
    return cost


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
