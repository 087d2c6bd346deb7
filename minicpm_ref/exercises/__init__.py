"""Checkers of the notebooks' exercises, one module a notebook: `nb00`, `nb01`, ...

A checker takes the reader's function, runs it on inputs that catch the usual mistakes, and returns one sentence to
print. A function that still raises NotImplementedError is not an error but "not solved yet", so that a fresh notebook
runs from top to bottom; a wrong answer raises AssertionError with a hint. The solutions under notebooks/solutions/
run the same checkers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


def attempt(exercise: str, check: Callable[[], None]) -> str:
    """Run `check` and say how it went: "<exercise>: solved" or "<exercise>: not solved yet".

    Raises whatever `check` raises, except NotImplementedError, which is how an untouched exercise cell announces
    itself.
    """
    try:
        check()
    except NotImplementedError:
        return f"{exercise}: not solved yet"
    return f"{exercise}: solved"


class Operations(TorchDispatchMode):
    """Collects in `names` what torch runs inside a `with` block, such as "floor_divide", for exercises that forbid
    some of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__.rstrip("_"))
        return func(*args, **(kwargs or {}))
