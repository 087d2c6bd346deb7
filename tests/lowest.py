"""The oldest packages that pyproject.toml admits: `make test-lowest`.

The problem: a lower bound that nobody ever installs is a guess, and the first to find out is a user whose environment
held an older package (typer 0.15.0 to 0.15.3 died at every --help).

The idea: a virtual environment beside the usual one holds each requirement of `EXTRAS` at exactly its lower bound, and
borrows everything else (torch, pytest) from the environment that this script runs in. There the tests of what these
packages do for us run.

Left out: torch, whose other builds are gigabytes, and triton, which goes with it, are those of constraints.txt; the
notebooks' and the tests' own tools, because whoever runs those installs constraints.txt.

Run: python tests/lowest.py [more arguments of pytest]
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "lowest"
EXTRAS = ("kernels", "figures", "serve")
BORROWED = ("torch", "triton")
TESTS = (
    "tests/unit/test_checkpoint.py",
    "tests/unit/test_cli.py",
    "tests/unit/test_plotting.py",
    "tests/unit/test_sampling.py",
    "tests/unit/test_tokenizer.py",
    "tests/kernels/lowbit/test_ternary_cpu.py",
    "tests/kernels/sparse/test_cpu.py",
)
# The tour compares with transformers, which needs newer packages than the lowest of ours.
LEFT_OUT = "not tour and not transformers"


def lowest(project: dict[str, object]) -> list[str]:
    """ "name==version" for each requirement of the base and of EXTRAS, at its lower bound.

    Raises ValueError for a requirement without exactly one lower bound: then nobody knows what is the lowest.
    """
    extras: dict[str, list[str]] = project["optional-dependencies"]  # type: ignore[assignment]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]  # type: ignore[misc]
    pins = []
    for line in lines:
        requirement = Requirement(line)
        bounds = [each.version for each in requirement.specifier if each.operator == ">="]
        if len(bounds) != 1:
            raise ValueError(f"{line!r} has {len(bounds)} lower bounds (>=), expected one")
        if requirement.name not in BORROWED:
            pins.append(f"{requirement.name}=={bounds[0]}")
    return pins


def build(pins: list[str]) -> Path:
    """Python of an environment that holds `pins`; built anew when they changed."""
    python = FOLDER / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = FOLDER / "pins.txt"
    if done.exists() and done.read_text() == "\n".join(pins):
        return python
    done.unlink(missing_ok=True)
    venv.create(FOLDER, clear=True)
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *pins], check=True)
    query = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
    # Appended to sys.path behind the environment's own packages, so those win.
    borrowed = dict.fromkeys([str(ROOT), str(ROOT / "kernels"), *map(sysconfig.get_path, ("purelib", "platlib"))])
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    done.write_text("\n".join(pins))
    return python


def main() -> int:
    """Build the environment, say what is in it, run the tests; returns pytest's exit code."""
    pins = lowest(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"])
    print("lowest versions:", *pins, flush=True)
    python = build(pins)
    own = {"NUMBA_CACHE_DIR": str(FOLDER / "numba")}  # another numba's machine code
    helps = [[str(python), "-m", "minicpm_ref", *command, "--help"] for command in ((), ("generate",), ("info",))]
    for command in helps:
        subprocess.run(command, env=os.environ | own, cwd=FOLDER, check=True, stdout=subprocess.DEVNULL)
    tests = [str(python), "-m", "pytest", *TESTS, "-k", LEFT_OUT, "-q", "-p", "no:cacheprovider", *sys.argv[1:]]
    return subprocess.run(tests, env=os.environ | own, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
