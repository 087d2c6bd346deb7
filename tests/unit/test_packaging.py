"""The package as other people meet it: a wheel in an environment of its own, and an import that stays light."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WEIGHTS = {
    *(f"base/{name}" for name in ("model.safetensors", "tokenizer.json", "config.json", "card.json")),
    "held_out.jsonl",
}
# What would let an interpreter see the checkout, or other weights, in spite of being installed elsewhere.
LEAKS = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MINICPM_WEIGHTS"}


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, run outside the checkout with a clean environment."""
    env = {name: value for name, value in os.environ.items() if name not in LEAKS}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def sources(package: Path) -> set[str]:
    """Files of a package folder, named as they are inside a wheel."""
    return {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new virtual environment that holds the wheel and borrows the dependencies of this one.

    A path in a .pth file is appended to sys.path without reading the .pth files found there, so the borrowed folder
    brings torch and the others but not this environment's editable installation, which is itself a .pth file.
    """
    folder = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    borrowed = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return python


def test_wheel_holds_two_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert inside == sources(ROOT / "minicpm_ref") | sources(ROOT / "kernels" / "minicpm_kernels")
    assert {f"minicpm_ref/weights/{name}" for name in WEIGHTS} <= inside


def test_wheel_imports_without_the_checkout(clean_python: Path) -> None:
    code = "import minicpm_ref, minicpm_kernels as k; print(minicpm_ref.__file__); print(k.__file__)"
    environment = clean_python.parents[1].resolve()
    for imported in run(clean_python, "-c", code, cwd=environment).split():
        assert Path(imported).resolve().is_relative_to(environment), f"{imported} does not come from the wheel"


def test_wheel_generates_text(clean_python: Path) -> None:
    command = next(clean_python.parent.glob("minicpm-ref*"))
    prompt = "import os\n"
    text = run(command, "generate", "--prompt", prompt, "--max-new-tokens", "8", cwd=clean_python.parents[1])
    assert text.replace(prompt, "", 1).strip(), f"no text after the prompt: {text!r}"


def test_editable_installation_hides_the_repository_root(tmp_path: Path) -> None:
    """The exact mode maps two names; `tests` or a package called `kernels` must not become importable with them."""
    direct = json.loads(metadata.distribution("minicpm_ref").read_text("direct_url.json") or "{}")
    if not direct.get("dir_info", {}).get("editable"):
        pytest.skip("minicpm_ref is not installed in editable mode here")
    code = "import minicpm_ref, minicpm_kernels, sys; print('\\n'.join(sys.path))"
    paths = {Path(line).resolve() for line in run(sys.executable, "-c", code, cwd=tmp_path).splitlines() if line}
    assert not paths & {ROOT, ROOT / "kernels"}


def test_import_brings_no_optional_package(tmp_path: Path) -> None:
    code = "import json, sys, minicpm_ref; print(json.dumps(sorted(sys.modules)))"
    modules = set(json.loads(run(sys.executable, "-c", code, cwd=tmp_path)))
    # torch itself imports triton where it finds it; what we may not do is add to that.
    code = "import json, sys, torch; print(json.dumps(sorted(sys.modules)))"
    modules -= set(json.loads(run(sys.executable, "-c", code, cwd=tmp_path)))
    assert not modules & {"triton", "numba", "minicpm_kernels", "matplotlib", "transformers"}


def test_import_costs_less_than_a_second_beyond_torch(tmp_path: Path) -> None:
    """Processor time, smallest of three: what the import itself costs, whatever else the machine is doing."""
    code = "import torch, time; start = time.process_time(); import minicpm_ref; print(time.process_time() - start)"
    seconds = min(float(run(sys.executable, "-c", code, cwd=tmp_path)) for _ in range(3))
    assert seconds < 1.0, f"import minicpm_ref takes {seconds:.2f} s beyond torch"
