"""One list of dependencies, three files that speak of it: pyproject.toml, constraints.txt, environment.yml.

pyproject.toml says what is needed, constraints.txt which version CI installs, environment.yml hands both to conda.
Whatever repeats a version elsewhere (README, pre-commit, workflow, citation) is compared here too.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import minicpm_ref

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
OURS = {"minicpm_ref", "minicpm_kernels"}
ON_PATH = ("kernels/bench", "figures", "tests/unit")  # folders whose files tests import by name
# Import name -> the requirement that brings it, where the two differ.
DISTRIBUTION = {"yaml": "pyyaml", "llvmlite": "numba", "IPython": "ipykernel", "fasttext": "fasttext-community"}


def constraints() -> dict[str, str]:
    """Distribution name -> pinned version; refuses anything but an exact pin."""
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([\w.-]+)==([\w.!]+)", line).groups()
            assert canonicalize_name(name) not in pins, f"{name} is pinned twice"
            pins[canonicalize_name(name)] = version
    return pins


def requirements(lines: list[str]) -> list[Requirement]:
    """Parsed requirements without the project's references to its own extras."""
    return [r for r in map(Requirement, lines) if canonicalize_name(r.name) != "minicpm-ref"]


def names(*extras: str) -> set[str]:
    """Distributions of the base installation and of these extras, following references between extras."""
    found = {canonicalize_name(r.name) for r in requirements(PROJECT["dependencies"])}
    for extra in extras:
        found |= {canonicalize_name(r.name) for r in requirements(EXTRAS[extra])}
        for reference in map(Requirement, EXTRAS[extra]):
            if canonicalize_name(reference.name) == "minicpm-ref":
                found |= names(*reference.extras)
    return found


DECLARED = {
    "build-system": PYPROJECT["build-system"]["requires"],
    "dependencies": PROJECT["dependencies"],
    **EXTRAS,
}


@pytest.mark.parametrize("section", DECLARED)
def test_every_requirement_is_pinned_to_a_version_it_allows(section: str) -> None:
    pins = constraints()
    for requirement in requirements(DECLARED[section]):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement} of [{section}] has no line in constraints.txt"
        assert pin in requirement.specifier, f"constraints.txt pins {pin}, [{section}] asks for {requirement}"
        assert requirement.specifier, f"{requirement} of [{section}] states no lower bound"


def test_base_installation_stays_small() -> None:
    assert names() == {
        *("torch", "numpy", "einops", "safetensors"),
        *("tokenizers", "huggingface-hub", "rich", "typer", "jinja2", "filelock"),  # the last two come with torch
    }


def test_dev_extra_brings_every_other_extra() -> None:
    assert names("dev") == names(*EXTRAS)


def test_torch_and_triton_are_a_pair() -> None:
    """torch's GPU builds require one exact triton; the kernels are tested with that one."""
    pins = constraints()
    assert (pins["torch"], pins["triton"]) == ("2.13.0", "3.7.1")
    triton = next(r for r in requirements(EXTRAS["kernels"]) if r.name == "triton")
    assert str(triton.marker) == 'sys_platform == "linux"'


@pytest.mark.skipif(sys.platform != "linux", reason="constraints.txt lists what an installation on Linux brings")
def test_constraints_are_closed() -> None:
    """Every distribution that `dev` pulls in, however indirectly, is pinned: CI cannot drift."""
    pins, seen, queue = constraints(), set(), sorted(names("dev"))
    while queue:
        name = queue.pop()
        # torch's CUDA builds bring libraries of their own, in versions that torch itself fixes.
        if name in seen or name.startswith(("nvidia-", "cuda-")):
            continue
        seen.add(name)
        assert name in pins, f"{name} is installed by [dev] and has no line in constraints.txt"
        for requirement in map(Requirement, metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(canonicalize_name(requirement.name))


def test_conda_environment_installs_the_same() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, pip = environment["dependencies"]
    python = next(line for line in conda if line.startswith("python=")).removeprefix("python=")
    assert f"{python}.0" in SpecifierSet(PROJECT["requires-python"])
    assert pip == {"pip": ["-c constraints.txt", f"torch=={constraints()['torch']}", "-e .[dev]"]}


@pytest.mark.parametrize(
    "path",
    ["README.md", "README.zh-CN.md", "CONTRIBUTING.md", ".pre-commit-config.yaml", ".github/workflows/test.yml"],
)
def test_versions_written_elsewhere_are_the_pins(path: str) -> None:
    written = re.findall(r"\b([\w-]+)==(\d[\w.]*\w)", (ROOT / path).read_text(encoding="utf-8"))
    assert {(name, constraints()[canonicalize_name(name)]) for name, _ in written} == set(written)


def test_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (minicpm_ref.__version__, PROJECT["license"])


def python_sources(folder: str) -> Iterator[tuple[Path, str]]:
    """(path, code) of the Python files and the notebooks' code cells under a folder of the repository."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield path, path.read_text(encoding="utf-8")
    for path in sorted((ROOT / folder).rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
            yield path, re.sub(r"(?m)^\s*[%!].*$", "pass", "\n".join(code))  # magics are not Python


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Top-level names of absolute imports of other people's packages."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found - set(sys.stdlib_module_names)


def distributions(modules: set[str]) -> set[str]:
    return {canonicalize_name(DISTRIBUTION.get(module, module)) for module in modules}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("minicpm_ref", ("figures", "test")),
        ("kernels", ("kernels", "figures")),
        ("notebooks", ("notebooks",)),
        ("figures", ("figures",)),
        ("tests", ("test", "kernels", "notebooks")),
    ],
)
def test_every_import_is_declared(folder: str, extras: tuple[str, ...]) -> None:
    for path, code in python_sources(folder):
        folders = (path.parent, *(ROOT / name for name in ON_PATH))
        neighbours = {p.stem for f in folders for p in f.iterdir() if p.suffix == ".py" or p.is_dir()} | OURS
        missing = distributions(imported(ast.walk(ast.parse(code))) - neighbours) - names(*extras)
        assert not missing, f"{path.relative_to(ROOT)} imports {sorted(missing)}, which no requirement brings"


def test_module_level_imports_of_the_package_need_only_the_base_installation() -> None:
    """What sits inside a function may need an extra; what runs at import time may not."""
    for path, code in python_sources("minicpm_ref"):
        # the server is loaded by `minicpm-ref serve` alone, which asks for its extra first
        extras = ("serve",) if "server" in path.parts else ()
        missing = distributions(imported(iter(ast.parse(code).body)) - {"minicpm_ref"}) - names() - names(*extras)
        assert not missing, f"{path.relative_to(ROOT)} imports {sorted(missing)} at module level"


def test_who_may_import_whom() -> None:
    """The kernels know nothing of the reference; the reference knows the kernels in backend.py alone."""
    for path, code in python_sources("kernels/minicpm_kernels"):
        strangers = imported(ast.walk(ast.parse(code))) - {"torch", "triton", "numba", "llvmlite", "minicpm_kernels"}
        assert strangers <= {"numpy"}, f"{path.relative_to(ROOT)} imports {sorted(strangers)}"
    for path, code in python_sources("minicpm_ref"):
        if path.name != "backend.py":
            assert "minicpm_kernels" not in imported(ast.walk(ast.parse(code))), path.relative_to(ROOT)
