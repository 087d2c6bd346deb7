"""Compiling once, keeping the result on disk, and saying what is going on.

Problem. numba keeps machine code beside the source file, and throws it away when *that file* changes: in a package of
several files, an edited helper goes on running its old code (numba/numba#9483). And where no folder can be written, it
refuses to compile at all.

Idea. The name of every cached function ends in a digest of all the files of this room of which anything is compiled,
so an edit anywhere is another name. Where numba finds no folder for a cache, the function is compiled without one.

Functions that are exchanged for one another (a product in another format, say) are compiled as C functions and called
by address (`call_address`), so that the step is compiled once for all formats.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import int64, void
from numba.extending import intrinsic

from minicpm_kernels.engine.llvm import I64

Progress = Callable[[str], None]
NEVER_COMPILED = ("__init__.py", "decoder.py", "weights.py")
OPTIONS = {"error_model": "numpy", "nogil": True}
WORTH_SAYING = 1.0  # seconds: what was kept on disk is there at once, and no news
_listeners: list[Progress] = []


@functools.cache
def digest() -> str:
    """Sixteen hexadecimal digits that change with any source file of this room that has to do with machine code."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name not in NEVER_COMPILED:
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


@contextmanager
def reporting(listener: Progress | None) -> Iterator[None]:
    """Call `listener` with a line for every function that is compiled or loaded inside."""
    if listener is not None:
        _listeners.append(listener)
    try:
        yield
    finally:
        if listener is not None:
            _listeners.remove(listener)


def compile_address(name: str, signature: Any, function: Callable[..., Any]) -> Any:
    """`function` as a C function with an `address`; kept on disk under `name`."""
    return _compile(name, function, lambda f, cache: numba.cfunc(signature, cache=cache, error_model="numpy")(f))


def compile_function(name: str, signature: Any, function: Callable[..., Any]) -> Any:
    """`function` as machine code that Python calls without holding its lock; kept on disk under `name`."""
    return _compile(name, function, lambda f, cache: numba.njit(signature, cache=cache, **OPTIONS)(f))


def _compile(name: str, function: Callable[..., Any], build: Callable[..., Any]) -> Any:
    function.__qualname__ = f"{name}_{digest()}"
    start = time.perf_counter()
    try:
        compiled = build(function, True)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        compiled = build(function, False)
    seconds = time.perf_counter() - start
    for listener in _listeners if seconds >= WORTH_SAYING else ():
        listener(f"{name}: ready after {seconds:.1f} s")
    return compiled


@intrinsic
def call_address(typing_context, address, arguments):  # type: ignore[no-untyped-def]
    """Call the C function at `address` with a tuple of int64; it returns nothing."""
    count = len(arguments)
    signature = void(int64, arguments)

    def codegen(context, b, sig, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.VoidType(), [I64] * count)
        values = [b.extract_value(args[1], i) for i in range(count)]
        b.call(b.inttoptr(args[0], kind.as_pointer()), values)
        return context.get_dummy_value()

    return signature, codegen
