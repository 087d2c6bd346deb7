"""Threads that stay: they meet a few hundred times a token, so meeting must cost less than a microsecond.

Problem. A decode step of a small model is 30 to 200 products of a few microseconds each. Entering a parallel region of
numba or OpenMP costs one to three microseconds, waking a sleeping thread 25, starting one 240.

Idea. The workers are Python threads that sit inside one compiled function. A *command number* tells them to start, a
*barrier* counts them in: everybody adds one to a shared counter and spins until it has the next multiple of the number
of threads. A worker that hears nothing for a while leaves the compiled function and sleeps on a Python event until it
is called again, so an idle engine uses no processor. With one thread nothing is started.

Spinning politely: after a few thousand rounds a thread gives up its time slice, because on a shared machine the partner
it waits for may not be running at all.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import int64, njit, types, void
from numba.extending import intrinsic
from numpy.typing import NDArray

from minicpm_kernels.engine.llvm import I64, call

LINE = 8  # int64 in a cache line; counters of different threads stand that far apart
# places in the control block, in int64
ARRIVED, COMMAND, PARKED, STOP, TICKET = (LINE * place for place in range(5))
OWN = LINE * 8  # from here on two lines a thread: what it waits for at the barrier; the last command it has seen
CONTROL = 2 * LINE  # int64 a thread in the control block, which has four threads' room before that
IDLE_ROUNDS = 20000  # of listening before a worker goes to sleep: about a millisecond

_sched_yield = types.ExternalFunction("sched_yield", types.int32())


@intrinsic
def atomic_add(typing_context, address, value):  # type: ignore[no-untyped-def]
    """Add to an int64 in memory, sequentially consistent; returns what was there."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        return b.atomic_rmw("add", b.inttoptr(args[0], I64.as_pointer()), args[1], "seq_cst")

    return int64(int64, int64), codegen


@intrinsic
def atomic_load(typing_context, address):  # type: ignore[no-untyped-def]
    """The int64 at an address, sequentially consistent."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        return b.load_atomic(b.inttoptr(args[0], I64.as_pointer()), "seq_cst", 8)

    return int64(int64), codegen


@intrinsic
def _pause(typing_context):  # type: ignore[no-untyped-def]
    """Tell the core that this is a waiting loop, where there is such an instruction."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        if b.module.triple.startswith(("x86_64", "i686")):
            from llvmlite import ir

            call(b, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return void(), codegen


@njit(error_model="numpy", nogil=True)
def barrier(control, me, threads):  # type: ignore[no-untyped-def]
    """Wait for all `threads` threads; what each wrote before is seen by all afterwards."""
    if threads == 1:
        return
    own = OWN + 2 * LINE * me
    control[own] += threads
    wanted = control[own]
    at = control.ctypes.data + 8 * ARRIVED
    atomic_add(at, 1)
    rounds = 0
    while atomic_load(at) < wanted:
        _pause()
        rounds += 1
        if rounds > 3000:
            _sched_yield()
            rounds = 0


@njit(error_model="numpy", nogil=True)
def listen(control, me):  # type: ignore[no-untyped-def]
    """A worker waits for the next command: 1 heard, 0 nothing for a while (it is counted as parked), -1 stop."""
    own = OWN + 2 * LINE * me + LINE
    at = control.ctypes.data
    rounds = 0
    while atomic_load(at + 8 * COMMAND) == control[own]:
        _pause()
        rounds += 1
        if rounds % 1000 == 0:
            _sched_yield()
        if rounds > IDLE_ROUNDS:
            atomic_add(at + 8 * PARKED, 1)
            return 0
    control[own] += 1
    return -1 if control[STOP] else 1


class Workers:
    """`count` - 1 threads beside the caller's, all inside `serve(*arguments, thread)`.

    `serve` must return 0 when `listen` did, after which the thread sleeps, and -1 to end. The caller announces a
    command with `call` and then calls `serve` itself as thread 0. Threads end when this object is closed or collected.
    """

    def __init__(self, count: int, control: NDArray[np.int64], serve: Callable[..., int], arguments: tuple[Any, ...]):
        self.count, self.control = count, control
        control[:] = 0
        self._bell = threading.Condition()
        self._threads = [
            threading.Thread(target=_work, args=(serve, arguments, me, control, self._bell), daemon=True)
            for me in range(1, count)
        ]
        for thread in self._threads:
            thread.start()
        self._close = weakref.finalize(self, _stop, control, self._bell, self._threads)

    def call(self) -> None:
        """Announce a command to the workers; the caller takes part in it next."""
        if self.count > 1:
            _announce(self.control, self._bell)

    def close(self) -> None:
        """End the threads and wait for them; further calls do nothing."""
        self._close()


def _announce(control: NDArray[np.int64], bell: threading.Condition) -> None:
    if _next_command(control):  # somebody sleeps, or is about to
        with bell:
            bell.notify_all()


@njit("int64(int64[::1])", error_model="numpy")
def _next_command(control):  # type: ignore[no-untyped-def]
    """Count the command up, then look who sleeps: a worker does the two things in the other order, so one of the two
    sees the other."""
    at = control.ctypes.data
    atomic_add(at + 8 * COMMAND, 1)
    return atomic_load(at + 8 * PARKED)


@njit("int64(int64[::1], int64)", error_model="numpy")
def _wake(control, me):  # type: ignore[no-untyped-def]
    """Whether there is a command for a parked worker, which then is no longer parked."""
    at = control.ctypes.data
    if atomic_load(at + 8 * COMMAND) == control[OWN + 2 * LINE * me + LINE]:
        return 0
    atomic_add(at + 8 * PARKED, -1)
    return 1


def _work(
    serve: Callable[..., int],
    arguments: tuple[Any, ...],
    me: int,
    control: NDArray[np.int64],
    bell: threading.Condition,
) -> None:
    while serve(*arguments, me) == 0:
        with bell:
            while not _wake(control, me):
                bell.wait()


def _stop(control: NDArray[np.int64], bell: threading.Condition, threads: list[threading.Thread]) -> None:
    if threads:
        control[STOP] = 1
        _announce(control, bell)
        for thread in threads:
            thread.join()
