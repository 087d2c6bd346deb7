"""Answers to the exercises, one module a notebook, named as in minicpm_ref.exercises: `test_exercises.py` runs them.

- RIGHT pairs every checker of the notebook with an answer that it must accept.
- WRONG names the usual mistakes: checker, answer, and the words of the hint (a regular expression).
- EXTRA, where a module has it, is what its checkers take after the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Right = tuple[Callable[..., str], Callable[..., Any]]
Wrong = tuple[Callable[..., str], Callable[..., Any], str]
