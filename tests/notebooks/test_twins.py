"""A notebook's naive function and the package's function of the same name are the same function.

A cell tagged `twin` defines the version that the notebook derives. Here the cell is executed together with the
imports, the constants and the definitions that stand before it, and the function is run on every row of its table in
`minicpm_ref.cases` next to the package's function. Both see float64, so that the only accepted difference is the
order of operations.

A comparison that cannot fail guards nothing, so the twin is then broken on purpose, one operator at a time: a sign
flipped, a factor dropped, a comparison shifted by one. Every such mutant must be caught by the same rows.
"""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minicpm_kernels import testing
from minicpm_ref.cases import TABLES

from .tools import NOTEBOOKS, Cell, code_cells, definitions, package_function, run_source

# Mutants that compute the same function, so that no row can tell them apart: (function, mutation), with the reason.
EQUIVALENT: dict[tuple[str, str], str] = {}

SWAPS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}
SHIFTS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}


def twins() -> list[Any]:
    """(notebook, cell, function name) of every function that a `twin` cell defines."""
    found = []
    for path in NOTEBOOKS:
        for cell in code_cells(path):
            if "twin" in cell.tags:
                for node in definitions(cell):
                    found.append(pytest.param(path, cell, node.name, id=f"{path.stem}-{node.name}"))
    return found


def is_setup(node: ast.stmt) -> bool:
    """Imports, definitions and assignments of literals: what a later cell may need and what costs nothing to run."""
    if isinstance(node, ast.Assign):
        return all(isinstance(part, ast.Constant | ast.Tuple | ast.List | ast.Load) for part in ast.walk(node.value))
    return isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)


def setup_source(path: Path, last: Cell) -> str:
    """The set-up statements of the notebook's cells up to and including `last`."""
    lines = []
    for cell in code_cells(path):
        if cell.index > last.index:
            break
        lines += [ast.unparse(node) for node in ast.parse(cell.source).body if is_setup(node)]
    return "\n".join(lines)


def define(source: str, name: str, filename: str) -> Callable[..., Any]:
    """Execute `source` and return the function `name` that it defines."""
    namespace: dict[str, Any] = {"__name__": "notebook"}
    run_source(source, filename, namespace)
    function: Callable[..., Any] = namespace[name]
    return function


def disagreement(twin: Callable[..., Any], reference: Callable[..., Any], name: str) -> str | None:
    """The first row on which the two differ, with the difference in words; None when they agree on all rows."""
    for case in TABLES[name]:
        arguments = [testing.upcast(value) for value in case.build()]
        expected = reference(*copy.deepcopy(arguments))
        try:
            testing.assert_close(twin(*copy.deepcopy(arguments)), expected)
        except Exception as error:  # a broken twin may raise anything; whatever it is, the row has caught it
            return f"{case.name}: {type(error).__name__}: {error}"
    return None


def mutants(function: ast.FunctionDef) -> Iterator[tuple[str, ast.FunctionDef]]:
    """(what was broken, the broken function) for every operator of the body."""
    count = len(list(ast.walk(function)))
    for position in range(count):
        broken = copy.deepcopy(function)
        node = list(ast.walk(broken))[position]
        line = ast.unparse(node) if isinstance(node, ast.expr) else ""
        if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
            if isinstance(node.op, ast.Mult | ast.Div):
                node.right = ast.Constant(1)
                yield f"drop the factor in {line}", broken
            else:
                node.op = SWAPS[type(node.op)]()
                yield f"flip the sign in {line}", broken
        elif (
            isinstance(node, ast.UnaryOp)
            and isinstance(node.op, ast.USub)
            and not isinstance(node.operand, ast.Constant)
        ):
            node.op = ast.UAdd()
            yield f"flip the sign in {line}", broken
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in SHIFTS:
            node.ops[0] = SHIFTS[type(node.ops[0])]()
            yield f"shift the comparison in {line}", broken


def test_there_are_twins() -> None:
    assert twins(), "no notebook has a cell tagged `twin`"


@pytest.mark.parametrize(("path", "cell", "name"), twins())
def test_twin_equals_the_package(path: Path, cell: Cell, name: str) -> None:
    reference = package_function(name)
    twin = define(setup_source(path, cell), name, f"<{path.stem} cell {cell.index}>")
    ours, theirs = (list(inspect.signature(function).parameters.values()) for function in (twin, reference))
    assert [p.name for p in ours] == [p.name for p in theirs[: len(ours)]]
    # what a notebook leaves out must be something that one can leave out
    assert all(p.default is not inspect.Parameter.empty for p in theirs[len(ours) :])
    assert name in TABLES, f"minicpm_ref/cases has no rows for {name}"
    assert disagreement(twin, reference, name) is None


@pytest.mark.parametrize(("path", "cell", "name"), twins())
def test_broken_twins_are_caught(path: Path, cell: Cell, name: str) -> None:
    reference = package_function(name)
    source = setup_source(path, cell)
    node = next(part for part in definitions(cell) if part.name == name)
    assert isinstance(node, ast.FunctionDef), f"{cell.where}: a twin is a function"
    survivors = []
    for i, (what, broken) in enumerate(mutants(node)):
        text = f"{source}\n{ast.unparse(ast.fix_missing_locations(broken))}"
        twin = define(text, name, f"<{path.stem} {name} mutant {i}>")
        if disagreement(twin, reference, name) is None and (name, what) not in EQUIVALENT:
            survivors.append(what)
    assert not survivors, f"the rows of {name} do not notice: {survivors}"


class TestTheGuard:
    """The comparison itself, on a twin that is right and on mutants of it."""

    SOURCE = (
        "def rms_norm(x, weight, eps):\n    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight\n"
    )

    def twin(self, source: str) -> Callable[..., Any]:
        return define(f"import torch\n{source}", "rms_norm", f"<guard {hash(source)}>")

    def test_a_right_twin_passes(self) -> None:
        assert disagreement(self.twin(self.SOURCE), self.twin(self.SOURCE), "rms_norm") is None

    def test_every_mutation_is_made_and_caught(self) -> None:
        (function,) = ast.parse(self.SOURCE).body
        assert isinstance(function, ast.FunctionDef)
        made = list(mutants(function))
        assert [what.split(" in ")[0] for what, _ in made] == ["drop the factor", "drop the factor", "flip the sign"]
        for what, broken in made:
            twin = self.twin(ast.unparse(ast.fix_missing_locations(broken)))
            assert disagreement(twin, self.twin(self.SOURCE), "rms_norm") is not None, what

    def test_a_wrong_dtype_or_shape_is_caught(self) -> None:
        flat = self.twin(self.SOURCE.replace("return x", "return (x").replace("* weight", "* weight).flatten()"))
        assert disagreement(flat, self.twin(self.SOURCE), "rms_norm") is not None

    def test_a_float32_result_is_judged_as_float32(self) -> None:
        single = self.twin(self.SOURCE.replace("return x", "x, weight = x.float(), weight.float()\n    return x"))
        assert disagreement(single, self.twin(self.SOURCE), "rms_norm") is None
        assert single(torch.ones(2), torch.ones(2), 0.0).dtype == torch.float32
