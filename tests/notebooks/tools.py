"""What the notebook guards share: finding the notebooks, reading them, and finding the package function behind a
name.

The package is searched by `ast`, not by import, so that a guard that only reads text stays fast and one broken module
cannot hide the findings about the others.
"""

from __future__ import annotations

import ast
import importlib
import json
import linecache
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("[0-9]*.ipynb"))


@dataclass(frozen=True)
class Cell:
    """One cell of a notebook, its source joined."""

    index: int
    kind: str
    source: str
    tags: tuple[str, ...]
    count: int | None
    outputs: tuple[dict[str, Any], ...]

    @property
    def where(self) -> str:
        """How a failure names the cell."""
        first = self.source.strip().splitlines()[0] if self.source.strip() else ""
        return f"cell {self.index} ({first[:60]!r})"


def read(path: Path) -> list[Cell]:
    """The cells of a notebook file."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [
        Cell(
            index=i,
            kind=cell["cell_type"],
            source="".join(cell["source"]),
            tags=tuple(cell["metadata"].get("tags", ())),
            count=cell.get("execution_count"),
            outputs=tuple(cell.get("outputs", ())),
        )
        for i, cell in enumerate(cells)
    ]


def code_cells(path: Path) -> list[Cell]:
    """The code cells that hold code."""
    return [cell for cell in read(path) if cell.kind == "code" and cell.source.strip()]


def output_text(cell: Cell) -> str:
    """Everything a cell printed or displayed as text, without pictures."""
    parts: list[str] = []
    for output in cell.outputs:
        parts.append("".join(output.get("text", "")))
        data = output.get("data", {})
        parts += ["".join(value) for kind, value in data.items() if kind.startswith("text/")]
    return "\n".join(parts)


def definitions(cell: Cell) -> list[ast.FunctionDef | ast.ClassDef]:
    """The functions and classes that a cell defines at top level."""
    return [node for node in ast.parse(cell.source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def public_functions() -> dict[str, list[str]]:
    """Function name -> the public modules of `minicpm_ref` that define it at top level, found without importing them.

    The case tables, the exercise checkers and the commands of the command line are not part of what the notebooks
    derive, so they are left out.
    """
    found: dict[str, list[str]] = {}
    package = ROOT / "minicpm_ref"
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        underived = parts[0] in ("cases", "exercises", "cli") or parts[-1] == "commands"
        if underived or any(part.startswith("_") for part in parts):
            continue
        module = ".".join(("minicpm_ref", *parts))
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(module)
    return found


def package_function(name: str) -> Callable[..., Any]:
    """The one public function of `minicpm_ref` with this name.

    Raises AssertionError when no module, or more than one, defines it.
    """
    modules = public_functions().get(name, [])
    assert len(modules) == 1, (
        f"{name} is defined by {modules or 'no public module'} of minicpm_ref, expected exactly one"
    )
    function: Callable[..., Any] = getattr(importlib.import_module(modules[0]), name)
    return function


def run_source(source: str, filename: str, namespace: dict[str, Any]) -> None:
    """Execute `source` as a notebook would: with lines that `inspect` finds, which a Triton kernel needs to
    compile."""
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), namespace)
