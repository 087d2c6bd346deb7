"""Nothing stands alone: what a notebook introduces is in the package, and what is fast has a reference, rows and
tests.

Two registers are held together here. A function of a notebook: defined in a `twin` cell, kept by `minicpm_ref`, with
a docstring and rows in `minicpm_ref.cases`. A kernel: listed in `minicpm_kernels.registry`, twin of a function with
the same signature, with rows, a test in the interpreter's lane and a test in the ahead-of-time lane.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from minicpm_kernels.registry import KERNELS, Kernel
from minicpm_ref.cases import TABLES

from .tools import NOTEBOOKS, ROOT, code_cells, definitions, package_function, public_functions

# The first notebook is a tour of the others: it uses the package and derives nothing.
TOURS = {"00_start_here"}
# modules of minicpm_kernels that hold no kernel
SUPPORT = {"registry", "testing", "aot", "checks", "cpu_threads", "disk_cache", "sparse.arguments", "sparse.windows"}

# rooms that are one program instead of twins of functions; its executor is held to the reference decoder
PROGRAMS = {"engine"}


def kernel_functions() -> set[tuple[str, str]]:
    """(public function, module) for everything in `minicpm_kernels` that is not support code, a jitted kernel or a part
    of one."""
    parts = {part for kernel in KERNELS for part in kernel.parts}
    found = set()
    package = ROOT / "kernels" / "minicpm_kernels"
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        if module.split(".")[1] in PROGRAMS:
            continue
        if path.stem.startswith("_") or module in parts or module.partition(".")[2] in SUPPORT:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not node.decorator_list:
                found.add((node.name, module))
    return found


@functools.cache
def collected_kernel_tests() -> list[str]:
    """The ids of all tests under tests/kernels, as pytest itself collects them."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/kernels"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return [line for line in result.stdout.splitlines() if "::" in line]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_derives_something_the_package_keeps(path: Path) -> None:
    twins = [node.name for cell in code_cells(path) if "twin" in cell.tags for node in definitions(cell)]
    assert twins or path.stem in TOURS, "no cell is tagged `twin`"
    for name in twins:
        function = package_function(name)
        assert inspect.getdoc(function), f"{function.__module__}.{name} has no docstring"
        assert TABLES.get(name), f"minicpm_ref/cases has no rows for {name}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_copy_of_a_package_function_is_a_twin(path: Path) -> None:
    """A function that carries a package function's name in a cell without the tag would drift unseen."""
    public = public_functions()
    for cell in code_cells(path):
        if set(cell.tags) & {"twin", "exercise"}:
            continue
        for node in definitions(cell):
            assert node.name not in public, f"{cell.where} redefines {node.name} of {public[node.name]}: tag it `twin`"


def test_every_kernel_is_registered() -> None:
    assert len({(kernel.name, kernel.language) for kernel in KERNELS}) == len(KERNELS), "an entry stands there twice"
    assert {(kernel.name, kernel.module) for kernel in KERNELS} == kernel_functions()


def test_every_table_belongs_to_one_function() -> None:
    for name, rows in TABLES.items():
        assert package_function(name)
        names = [case.name for case in rows]
        assert len(names) == len(set(names)), f"two rows of {name} have the same name"


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"{kernel.name}-{kernel.language}")
class TestKernel:
    def test_has_a_reference_with_its_signature(self, kernel: Kernel) -> None:
        reference = package_function(kernel.name)
        assert reference.__module__ == kernel.reference
        function = getattr(importlib.import_module(kernel.module), kernel.name)
        ours, theirs = (inspect.signature(one).parameters.values() for one in (function, reference))
        assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]
        assert inspect.getdoc(function)

    def test_has_rows(self, kernel: Kernel) -> None:
        assert TABLES.get(kernel.name)

    def test_has_a_test_against_its_reference(self, kernel: Kernel) -> None:
        wanted = f"::test_kernel_equals_reference[{kernel.name}-{kernel.language}-"
        assert any(wanted in test for test in collected_kernel_tests()), f"no test id contains {wanted}"

    def test_has_a_compile_test(self, kernel: Kernel) -> None:
        if kernel.language == "numba":
            pytest.skip("numba compiles when the function is first called, which the test against the reference does")
        wanted = f"::test_compiles[{kernel.name}-"
        assert any(wanted in test for test in collected_kernel_tests()), f"no test id contains {wanted}"
