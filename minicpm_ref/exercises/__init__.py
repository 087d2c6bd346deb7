"""Checkers of the notebooks' exercises, one module a notebook: `nb00`, `nb01`, ...

A checker takes the reader's function, runs it on inputs that catch the usual mistakes, and returns one sentence to
print. A function that still raises NotImplementedError is not an error but "not solved yet", so that a fresh notebook
runs from top to bottom; a wrong answer raises AssertionError with a hint. The solutions under notebooks/solutions/
run the same checkers.
"""

from __future__ import annotations

from collections.abc import Callable


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
