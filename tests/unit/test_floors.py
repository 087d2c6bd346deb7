"""The house: a file imports only from floors at or below its own, and what is not on the table has no place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import minicpm_ref

PACKAGE = Path(minicpm_ref.__file__).parent
# room or trunk file -> floor; within a room anything may be imported, between equals nothing
FLOORS = {
    name: floor
    for floor, names in {
        1: "config published chat_template backend files machine row_blocks plotting terminal",
        2: "ops sparse lowbit tokenizer",
        3: "cache data",
        4: "model",
        5: "formats sampling evaluate",
        6: "checkpoint speculative cases",
        7: "training engine tour",
        8: "wind_tunnel ultraclean arkinfer",
        9: "studies train exercises",
        10: "cli",
        11: "__main__",
    }.items()
    for name in names.split()
}
# published is what config reads, config is what speculative and checkpoint share; these pairs share a floor on purpose
SAME_FLOOR = {("config", "published")}


def room(path: Path) -> str:
    """The trunk file or the folder that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(source: str) -> set[str]:
    """Rooms of the package that a file imports when it is loaded; what stands in a function is a choice made later."""
    found: set[str] = set()
    pending: list[ast.AST] = list(ast.parse(source).body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module == "minicpm_ref":
            names = [f"minicpm_ref.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("minicpm_ref.")}
        pending += ast.iter_child_nodes(node)
    return found


def upward(name: str, source: str) -> list[str]:
    """The imports of a file of room `name` that do not go down."""
    return [
        f"{name} (floor {FLOORS[name]}) imports {other} (floor {FLOORS[other]})"
        for other in sorted(imports(source))
        if other != name and FLOORS[other] >= FLOORS[name] and (name, other) not in SAME_FLOOR
    ]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return  # hands on the public names of every floor
    assert upward(room(path), path.read_text("utf-8")) == []


def test_every_room_stands_on_a_floor() -> None:
    rooms = {room(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert rooms <= FLOORS.keys()


def test_an_import_upward_is_named() -> None:
    assert upward("ops", "from minicpm_ref.model import MiniCPM") == ["ops (floor 2) imports model (floor 4)"]
    assert upward("cache", "from minicpm_ref import data") == ["cache (floor 3) imports data (floor 3)"]
    assert upward("ops", "def f():\n    from minicpm_ref.model import MiniCPM") == []
    inside = "class A:\n    import minicpm_ref.engine.server"
    assert upward("cache", inside) == ["cache (floor 3) imports engine (floor 7)"]
