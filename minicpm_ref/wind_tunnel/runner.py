"""Run many independent tasks, here or on a cluster, and survive what happens to them.

`run_tasks` gives the tasks that are not finished yet to a process pool with one thread a run (the default), or to Ray.
Two runs of one thread each do more work in an hour than one run of two threads, because a tiny model's products are too
small to share.

Whatever happens to one run, the others go on: an error, an exit or a killed process becomes a "failed" outcome with
the text of the error and the place of the log. Errors travel as text: an exception that cannot be rebuilt in the parent
can therefore not hang it. Ctrl-C lets the runs save their state; the same call later goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from minicpm_ref.wind_tunnel.tasks import LOG, Stopped, Task, execute, finished, request_stop

PATIENCE = 60.0  # seconds that a stopping run has to save its state


@dataclass(frozen=True)
class Outcome:
    """What became of a task: "finished" (now), "kept" (finished before), "failed" or "stopped", and why."""

    name: str
    status: str
    message: str = ""


def run_tasks(
    tasks: Sequence[Task],
    folder: str | Path,
    inputs: Mapping[str, Any] | None = None,
    workers: int = 1,
    threads: int = 1,
    ray: str | None = None,
    console: Console | None = None,
) -> list[Outcome]:
    """Run every task that has no record below `folder` yet; returns the outcomes in the order of `tasks`.

    `workers` processes of `threads` threads each run at a time; with `ray` ("auto" or the address of a cluster) Ray
    decides how many. Raises KeyboardInterrupt on Ctrl-C or SIGTERM, once the runs have saved their state;
    ValueError for two tasks of one name or a record of other settings; RuntimeError when another run is using the
    folder.

    >>> run_tasks([Task("root", "math:sqrt", {})], "runs/example")      # doctest: +SKIP
    """
    folder, inputs, console = Path(folder), dict(inputs or {}), console or Console()
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two tasks are called {', '.join(twice)}: expected a name a task")
    outcomes: dict[str, Outcome] = {}
    with _only_one(folder):
        waiting = []
        for task in tasks:
            if finished(task, folder) is None:
                waiting.append(task)
            else:
                outcomes[task.name] = Outcome(task.name, "kept")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        showing = Progress(*columns, console=console, disable=not console.is_terminal)
        with _interruptible(), showing as progress:
            bar = progress.add_task("runs", total=len(tasks), completed=len(outcomes))

            def report(outcome: Outcome) -> None:
                outcomes[outcome.name] = outcome
                failed = sum(o.status == "failed" for o in outcomes.values())
                progress.update(bar, completed=len(outcomes), description=f"runs, {failed} failed")
                words = f"{len(outcomes)}/{len(tasks)} {outcome.name}: {outcome.status}"
                console.print(f"{words}\n{outcome.message}" if outcome.message else words, markup=False)

            if ray is not None:
                from minicpm_ref.wind_tunnel.cluster import run_ray

                run_ray(waiting, folder, inputs, ray, threads, report)
            else:
                run_pool(waiting, folder, inputs, workers, threads, report)
    return [outcomes.get(name, Outcome(name, "stopped")) for name in names]


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system drops it however this process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{folder}: another run is using this folder; wait for it, or name another") from None
        yield


def attempt(task: Task, folder: Path, inputs: Mapping[str, Any], threads: int) -> Outcome:
    """Execute `task` in this process with its output in its log; an error becomes an outcome."""
    where = folder / task.name
    where.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    with _output_into(where / LOG):
        try:
            if task.processes > 1:
                _execute_with_torchrun(task, folder, inputs)
            else:
                execute(task, folder, inputs)
        except Stopped:
            return Outcome(task.name, "stopped")
        except Exception as error:
            traceback.print_exc()
            words = f"{type(error).__name__}: {error}; see {LOG} in {where}"
            return Outcome(task.name, "failed", words)
    return Outcome(task.name, "finished")


@contextmanager
def _output_into(path: Path) -> Iterator[None]:
    """Everything that this process and its children print goes to the end of `path`."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for copy, stream in zip(saved, (1, 2), strict=True):
            os.dup2(copy, stream)
            os.close(copy)


def _serve(pipe: connection.Connection, folder: Path, inputs: Mapping[str, Any], threads: int) -> None:
    """A worker: takes tasks from the pipe until it closes. SIGINT and SIGTERM let the run in it save and stop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: request_stop())
    while True:
        try:
            pipe.send(attempt(pipe.recv(), folder, inputs, threads))
        except (EOFError, BrokenPipeError):  # whoever asked has gone, or has nothing more to ask
            return


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt as Ctrl-C does, and SIGINT does so even in a process started with `&`, where the
    shell has it ignored. Outside the main thread Python allows no handlers, and nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_pool(
    tasks: Sequence[Task],
    folder: Path,
    inputs: Mapping[str, Any],
    workers: int,
    threads: int,
    report: Callable[[Outcome], None],
) -> None:
    """Run `tasks` in `workers` processes. Ctrl-C asks the running ones to save, waits for them, and raises again."""
    if workers < 1 or threads < 1:
        raise ValueError(f"workers = {workers}, threads = {threads}: expected at least 1 each")
    context = get_context("spawn")  # a fork would copy torch's thread pool in an unknown state
    queue = deque(tasks)
    crew: dict[Any, tuple[connection.Connection, Task]] = {}  # process -> its pipe and what it runs
    idle: list[tuple[Any, connection.Connection]] = []
    try:
        while queue or crew:
            while queue and len(crew) < workers:
                if idle:
                    process, pipe = idle.pop()
                else:
                    pipe, theirs = context.Pipe()
                    process = context.Process(target=_serve, args=(theirs, folder, inputs, threads), daemon=False)
                    process.start()
                    theirs.close()
                task = queue.popleft()
                pipe.send(task)
                crew[process] = pipe, task
            connection.wait([thing for process, (pipe, _) in crew.items() for thing in (pipe, process.sentinel)])
            for process, (pipe, task) in list(crew.items()):
                if pipe.poll():
                    try:
                        outcome = pipe.recv()
                    except EOFError:
                        outcome = _death(process, task, folder)
                    else:
                        idle.append((process, pipe))
                elif not process.is_alive():
                    outcome = _death(process, task, folder)
                else:
                    continue
                del crew[process]
                report(outcome)
    except KeyboardInterrupt:
        for process in crew:
            os.kill(process.pid, signal.SIGINT)
        for pipe, _ in crew.values():
            if pipe.poll(PATIENCE):
                with suppress(EOFError):  # it died instead of stopping; its state of a minute ago remains
                    report(pipe.recv())
        raise
    finally:
        for process, pipe in [*idle, *((process, pipe) for process, (pipe, _) in crew.items())]:
            pipe.close()
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _death(process: Any, task: Task, folder: Path) -> Outcome:
    process.join()
    code = process.exitcode
    how = f"was killed by signal {-code}" if code < 0 else f"left with exit code {code}"
    return Outcome(task.name, "failed", f"the process {how}; see {LOG} in {folder / task.name}")


def _execute_with_torchrun(task: Task, folder: Path, inputs: Mapping[str, Any]) -> None:
    """Let `task.processes` processes run the task together; the first one writes the record."""
    job = json.dumps({"task": asdict(task), "folder": str(folder), "inputs": dict(inputs)})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(task.processes)]
    result = subprocess.run([*command, "-m", "minicpm_ref.wind_tunnel.together", job])
    if result.returncode:
        raise RuntimeError(f"torchrun left with exit code {result.returncode}")
