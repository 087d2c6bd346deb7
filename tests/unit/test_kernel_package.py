"""`minicpm_kernels` stays importable where triton and numba are not: only its kernel modules import them."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import minicpm_kernels
from minicpm_ref.exercises import attempt


@pytest.mark.parametrize("module", ["minicpm_kernels", "minicpm_kernels.registry", "minicpm_kernels.testing"])
def test_support_modules_import_neither_triton_nor_numba(module: str) -> None:
    # an entry of None makes `import triton` fail, as it does where it is not installed
    code = f"import sys; sys.modules['triton'] = sys.modules['numba'] = None; import {module}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_package_names_its_modules() -> None:
    modules = [module.name for module in pkgutil.iter_modules(minicpm_kernels.__path__)]
    assert [name for name in modules if f"`{name}`" not in (minicpm_kernels.__doc__ or "")] == []


def test_an_exercise_is_solved_untouched_or_wrong() -> None:
    def untouched() -> None:
        raise NotImplementedError

    def wrong() -> None:
        raise AssertionError("look at the mask")

    assert attempt("one", lambda: None) == "one: solved"
    assert attempt("one", untouched) == "one: not solved yet"
    with pytest.raises(AssertionError, match="look at the mask"):
        attempt("one", wrong)
