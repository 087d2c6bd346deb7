"""Run one function over many shards: in this process, or in several on this machine.

The problem: a pool that loses a worker, or gets an error that cannot be rebuilt in the parent, waits for ever; and
Ctrl-C leaves orphans behind.
The idea: a worker never sends an exception, only its words; a dead worker ends the run at once; and workers leave
Ctrl-C to the parent. What a shard wrote before stays finished, so the next call goes on there.

Results are joined by the number of the shard, never by the order in which they come.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.context import BaseContext
from typing import Any

Task = Callable[[int], Any]


class ShardError(RuntimeError):
    """A shard failed, in the words of its worker."""


def run_shards(
    task: Task, numbers: Sequence[int], workers: int = 1, done: Callable[[int, Any], None] = lambda number, result: None
) -> None:
    """Call `task(number)` for every number and `done(number, result)` in this process as results come.

    `task` must be picklable for workers > 1. Raises ShardError with type, message and traceback when a task fails or a
    worker dies; the others are stopped, and no process remains.
    """
    if workers < 1:
        raise ValueError(f"workers = {workers}: expected at least 1")
    if workers == 1 or len(numbers) < 2:
        for number in numbers:
            done(number, unwrap(attempt(task, number)))
        return
    pool = ProcessPoolExecutor(min(workers, len(numbers)), _context(), initializer=_obey_parent)
    try:
        futures = {pool.submit(attempt, task, number): number for number in numbers}
        for future in as_completed(futures):
            done(futures[future], unwrap(future.result()))
    except BaseException as error:  # Ctrl-C included: nothing may go on without a parent
        for process in list((pool._processes or {}).values()):
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise ShardError(f"a worker died (killed, or out of memory): {error}; call again to go on") from None
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _context() -> BaseContext:
    """Workers are copies of a fresh process that has done nothing but import, where the system can fork; elsewhere each
    imports for itself. A copy of *this* process would hold the locks of torch's threads without the threads."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["minicpm_ref.ultraclean.pipeline"])
    return context


def _obey_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when it has been killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def attempt(task: Task, number: int) -> tuple[str, Any]:
    """("ok", result) or ("failed", words): an exception as text, because not every exception survives pickling."""
    try:
        return "ok", task(number)
    except Exception as error:
        where = "".join(traceback.format_exception(error)[-4:])
        return "failed", f"shard {number}: {type(error).__name__}: {error}\n{where}"


def unwrap(outcome: tuple[str, Any]) -> Any:
    """The result of an `attempt`. Raises ShardError with the words of a failed one."""
    state, value = outcome
    if state == "failed":
        raise ShardError(value)
    return value

