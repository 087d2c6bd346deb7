"""Every notebook keeps the contract of CONTRIBUTING.md: sections in order, executed once from top to bottom, short
cells.

All of it is read from the file with `json` and `ast`; nothing is executed here. Strict nbval executes the notebooks
and compares their outputs; it cannot see a missing section, and it skips cells whose execution count was stripped, so
this file asserts both.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from .tools import NOTEBOOKS, ROOT, SOLUTIONS, Cell, code_cells, output_text, read

SECTIONS = (
    "The question",
    "Predict",
    "Tiny numbers",
    "Naive",
    "Real weights",
    "Fast",
    "Check against the package",
    "Figure",
    "Exercises",
    "What was left out",
    "Next",
)
TAGS = {
    "twin",  # defines the naive version under the package function's name and signature
    "exercise",  # the reader's code goes here
    "solution",
    "raises-exception",
    "nbval-ignore-output",
    "nbval-check-output",
    "nbval-skip",
}
LONGEST_CELL = 40
LARGEST_FILE = 1_000_000
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/~<-])/(?:home|root|Users|work|tmp|mnt|opt|usr|var|srv|content|kaggle|private)/|\b[A-Za-z]:\\\\?[A-Za-z]"
)
ALL = NOTEBOOKS + SOLUTIONS


def label(path: Path) -> str:
    """The test id of a notebook."""
    return path.relative_to(ROOT / "notebooks").as_posix().removesuffix(".ipynb")


def headings(cells: list[Cell]) -> list[str]:
    """The markdown headings of a notebook, in order."""
    text = "\n".join(cell.source for cell in cells if cell.kind == "markdown")
    return re.findall(r"^#{1,6}\s+(.+)$", text, re.M)


def missing_sections(found: list[str]) -> list[str]:
    """The required sections that do not occur, or not in the required order, among the headings `found`."""
    missing, position = [], 0
    lowered = [heading.lower() for heading in found]
    for section in SECTIONS:
        hits = [i for i in range(position, len(lowered)) if section.lower() in lowered[i]]
        if hits:
            position = hits[0] + 1
        else:
            missing.append(section)
    return missing


def calls_of(node: ast.AST) -> set[str]:
    """The last names of everything that is called inside `node`: `torch.allclose(...)` gives `allclose`."""
    names = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Call):
            function = child.func
            names.add(function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", ""))
    return names


def soft_comparisons(source: str) -> list[int]:
    """Lines where a comparison of results is printed or thrown away instead of asserted."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
            continue
        names = calls_of(node)
        if names & {"allclose", "equal", "isclose", "array_equal"} and ("print" in names or len(names) == 1):
            lines.append(node.lineno)
    return lines


def section_cells(cells: list[Cell], section: str) -> list[Cell]:
    """The cells from the heading that contains `section` up to the next heading of the same or a higher level."""
    inside, level, found = False, 0, []
    for cell in cells:
        heading = re.match(r"(#{1,6})\s+(.+)", cell.source) if cell.kind == "markdown" else None
        if heading and inside and len(heading[1]) <= level:
            break
        if heading and section.lower() in heading[2].lower():
            inside, level = True, len(heading[1])
        if inside:
            found.append(cell)
    return found


def test_notebooks_are_found() -> None:
    """An empty glob would turn every test below into a silent pass."""
    assert NOTEBOOKS, f"no notebooks under {ROOT.name}/notebooks"
    assert [path.name for path in SOLUTIONS] == [path.name for path in NOTEBOOKS], "each notebook has one solution file"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=label)
def test_sections_stand_in_order(path: Path) -> None:
    assert missing_sections(headings(read(path))) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=label)
def test_title_states_cost(path: Path) -> None:
    """The first cell is the title and says how many CPU minutes it takes and what it downloads."""
    first = read(path)[0]
    assert first.kind == "markdown"
    assert re.match(r"# \S", first.source)
    assert re.search(r"CPU minute", first.source, re.I), "state the CPU minutes"
    assert re.search(r"download", first.source, re.I), "state what is downloaded, or that nothing is"


@pytest.mark.parametrize("path", ALL, ids=label)
def test_executed_once_from_top_to_bottom(path: Path) -> None:
    counts = [cell.count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("path", ALL, ids=label)
def test_tags(path: Path) -> None:
    for cell in read(path):
        assert set(cell.tags) <= TAGS, cell.where


@pytest.mark.parametrize("path", ALL, ids=label)
def test_cells_are_short(path: Path) -> None:
    for cell in code_cells(path):
        length = len(cell.source.rstrip().splitlines())
        assert length <= LONGEST_CELL, f"{cell.where} has {length} lines"


@pytest.mark.parametrize("path", ALL, ids=label)
def test_cells_are_plain_python(path: Path) -> None:
    """No magics and no shell lines: the guards parse the cells, and readers copy them into scripts."""
    for cell in code_cells(path):
        try:
            ast.parse(cell.source)
        except SyntaxError as error:
            pytest.fail(f"{cell.where}: {error}")


@pytest.mark.parametrize("path", ALL, ids=label)
def test_no_absolute_paths(path: Path) -> None:
    for cell in read(path):
        for text in (cell.source, output_text(cell)):
            hit = ABSOLUTE_PATH.search(text)
            assert hit is None, f"{cell.where}: {text[max(0, hit.start() - 30) : hit.end() + 30]!r}"


@pytest.mark.parametrize("path", ALL, ids=label)
def test_size(path: Path) -> None:
    assert path.stat().st_size <= LARGEST_FILE


@pytest.mark.parametrize("path", ALL, ids=label)
def test_cell_ids(path: Path) -> None:
    """nbformat 4.5 with unique cell ids, so that a diff shows which cell changed."""
    import nbformat

    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("path", ALL, ids=label)
def test_outputs_are_clean(path: Path) -> None:
    """No stored traceback and nothing on stderr, unless the cell shows an error on purpose."""
    for cell in code_cells(path):
        if "raises-exception" in cell.tags:
            continue
        for output in cell.outputs:
            assert output["output_type"] != "error", f"{cell.where}: {output.get('evalue')}"
            assert output.get("name") != "stderr", f"{cell.where}: {''.join(output.get('text', ''))[:200]}"


@pytest.mark.parametrize("path", ALL, ids=label)
def test_plot_cells_end_with_show(path: Path) -> None:
    """A last expression would print an object's address; `plt.show()` prints the figure's size, which is
    sanitised."""
    for cell in code_cells(path):
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            assert cell.source.rstrip().endswith("plt.show()"), cell.where


@pytest.mark.parametrize("path", ALL, ids=label)
def test_comparisons_are_asserted(path: Path) -> None:
    for cell in code_cells(path):
        assert soft_comparisons(cell.source) == [], f"{cell.where}: assert a comparison instead of printing it"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=label)
def test_checks_against_the_package(path: Path) -> None:
    """The section asserts, or calls a function that does, on the package's functions."""
    code = "\n".join(
        cell.source for cell in section_cells(read(path), "Check against the package") if cell.kind == "code"
    )
    assert re.search(r"\bassert(_\w+)?\b", code), "the section holds no assertion"
    everything = "\n".join(cell.source for cell in code_cells(path))
    assert "minicpm_ref" in everything


@pytest.mark.parametrize("path", NOTEBOOKS, ids=label)
def test_exercises(path: Path) -> None:
    """Two to four exercises, each with a folded hint, minutes and a difficulty, and a checker that the solution
    passes too."""
    cells = section_cells(read(path), "Exercises")
    text = "\n".join(cell.source for cell in cells if cell.kind == "markdown")
    assert 2 <= text.count("<details>") <= 4, "two to four exercises, each with one hint in <details>"
    assert len(re.findall(r"\d+\s*min", text)) >= text.count("<details>"), "state the minutes of each exercise"
    assert len(re.findall(r"easy|medium|hard", text, re.I)) >= text.count("<details>"), "state the difficulty of each"

    checkers = exercise_checkers(path)
    assert checkers, "the checkers stand in minicpm_ref/exercises"
    solution = path.parent / "solutions" / path.name
    for side in (path, solution):
        called = set().union(*(calls_of(ast.parse(cell.source)) for cell in code_cells(side)))
        assert checkers <= called, f"{label(side)} does not call {sorted(checkers - called)}"
    for cell in code_cells(solution):
        assert "not solved yet" not in output_text(cell), cell.where


def exercise_checkers(path: Path) -> set[str]:
    """The public functions of the notebook's module in minicpm_ref/exercises: `nb04.py` for `04_triton_from_zero`."""
    module = ROOT / "minicpm_ref" / "exercises" / f"nb{path.name[:2]}.py"
    assert module.exists(), f"{module.relative_to(ROOT)} is missing"
    tree = ast.parse(module.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")}


class TestTheGuards:
    """Each guard shows that it fails when the thing it guards is broken."""

    def test_a_missing_or_misplaced_section_is_seen(self) -> None:
        assert missing_sections([f"## {section}" for section in SECTIONS]) == []
        assert missing_sections(list(SECTIONS[:3] + SECTIONS[4:])) == ["Naive"]
        assert missing_sections([SECTIONS[1], SECTIONS[0], *SECTIONS[2:]]) == ["Predict"]

    @pytest.mark.parametrize(
        "text",
        ["open('/home/me/x')", "path = '/tmp/run'", "File /root/.venv/lib", r"C:\Users\me", "(/usr/lib/python3)"],
    )
    def test_an_absolute_path_is_seen(self, text: str) -> None:
        assert ABSOLUTE_PATH.search(text)

    @pytest.mark.parametrize(
        "text", ["https://host.org/home/page", "figures/data/x.json", "tokens/s and a / b", "../usr/", "r'\\n'"]
    )
    def test_other_slashes_pass(self, text: str) -> None:
        assert not ABSOLUTE_PATH.search(text)

    def test_a_printed_comparison_is_seen(self) -> None:
        assert soft_comparisons("print('match:', torch.allclose(a, b))") == [1]
        assert soft_comparisons("x = 1\ntorch.equal(a, b)") == [2]
        assert soft_comparisons("assert torch.allclose(a, b)\nprint(a)") == []
