"""The checkers of the exercises accept right answers, name each usual mistake, and wait for an untouched cell.

Every checker in minicpm_ref.exercises is found by itself; `exercise_answers` holds what they are tried on.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from minicpm_ref import exercises

NOTEBOOKS = [found.name for found in pkgutil.iter_modules(exercises.__path__)]


def module(notebook: str) -> ModuleType:
    return importlib.import_module(f"minicpm_ref.exercises.{notebook}")


def checkers(notebook: str) -> list[str]:
    home = module(notebook)
    return [name for name, value in vars(home).items() if name[:6] == "check_" and value.__module__ == home.__name__]


CHECKERS = [(notebook, name) for notebook in NOTEBOOKS for name in checkers(notebook)]


def answers(notebook: str) -> ModuleType:
    return importlib.import_module(f"exercise_answers.{notebook}")


def run(notebook: str, check: Callable[..., str], answer: Callable[..., Any]) -> str:
    return check(answer, *getattr(answers(notebook), "EXTRA", ()))


def untouched(*_: object, **__: object) -> Any:
    raise NotImplementedError


@pytest.mark.parametrize(("notebook", "name"), CHECKERS)
def test_right_answers_pass(notebook: str, name: str) -> None:
    right = [(check, answer) for check, answer in answers(notebook).RIGHT if check.__name__ == name]
    assert right, f"exercise_answers/{notebook}.py has no right answer for {name}"
    for check, answer in right:
        assert run(notebook, check, answer).endswith(": solved")


@pytest.mark.parametrize(("notebook", "name"), CHECKERS)
def test_an_untouched_cell_is_no_error(notebook: str, name: str) -> None:
    assert run(notebook, getattr(module(notebook), name), untouched).endswith(": not solved yet")


@pytest.mark.parametrize(("notebook", "name"), CHECKERS)
def test_each_mistake_is_named(notebook: str, name: str) -> None:
    wrong = {mistake: entry for mistake, entry in answers(notebook).WRONG.items() if entry[0].__name__ == name}
    assert wrong, f"exercise_answers/{notebook}.py has no mistake for {name}"
    for mistake, (check, answer, hint) in wrong.items():
        with pytest.raises(AssertionError, match=hint):
            print(f"{mistake}: {run(notebook, check, answer)}")
