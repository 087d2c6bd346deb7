"""Which implementation runs: the one place that decides between torch, triton and numba, and says why.

The problem: a fast kernel needs a package, a device, sometimes a CPU feature, and a program that probes for them in
twenty places behaves in twenty ways. The idea: references and kernels have one name and one signature, so choosing is
a table look-up, made here and reported by `describe` (the command `minicpm-ref info`).

The rule: on a GPU the triton kernel, on a CPU the numba kernel, if the operation has one and its package is
installed; otherwise torch, the reference. `MINICPM_BACKEND=torch`, `triton` or `numba` replaces the rule for every
operation that has such an implementation.

Some calls a kernel cannot take: most have no gradient, none has float64. By the rule the reference takes those
(`choose_for`); a backend that was asked for by name raises instead, since falling back would be 25 times slower without
a word.

triton and numba are imported when a kernel is first asked for, so that `import minicpm_ref` works where they are not
installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

ENVIRONMENT = "MINICPM_BACKEND"
BACKENDS = ("auto", "torch", "triton", "numba")
NATIVE = {"cpu": "numba", "cuda": "triton"}  # device type -> what runs there; ROCm calls its devices cuda, too

# operation -> module of its reference; the kernels that stand in for it are those of `minicpm_kernels.registry`
OPERATIONS = {
    "select_blocks": "minicpm_ref.sparse.blocks",
    "sparse_attention": "minicpm_ref.sparse.attention",
    "sparse_tree_attention": "minicpm_ref.sparse.tree",
    "ternary_matmul": "minicpm_ref.lowbit.ternary",
    "ternary_matmul_int8": "minicpm_ref.lowbit.ternary",
}


class Choice(NamedTuple):
    """One row of `describe`."""

    operation: str
    device: str
    backend: str
    reason: str


def choose(operation: str, device: torch.device | str = "cpu") -> str:
    """The backend ("torch", "triton" or "numba") that runs `operation` on `device`.

    Raises ValueError for an unknown operation or a wrong MINICPM_BACKEND, RuntimeError when MINICPM_BACKEND names a
    backend whose package is not installed.
    """
    return explain(operation, device).backend


def choose_for(operation: str, *tensors: Tensor, obstacle: str = "") -> str:
    """The backend that runs `operation` on these float tensors, all on one device: `choose`, but "torch" for a call
    that the kernel cannot take, which is one with a gradient, in float64, or with another `obstacle`, in words.

    Raises as `choose`, and RuntimeError when MINICPM_BACKEND names the backend that cannot take the call.
    """
    chosen = choose(operation, tensors[0].device)
    if chosen == "torch":
        return chosen
    if not obstacle and any(tensor.dtype == torch.float64 for tensor in tensors):
        obstacle = "float64"
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not obstacle and differentiable and not _kernels(operation)[chosen].gradients:
        obstacle = "a gradient: call the model under torch.no_grad()"
    if not obstacle:
        return chosen
    if os.environ.get(ENVIRONMENT, "auto").lower() == chosen:
        raise RuntimeError(
            f"{ENVIRONMENT}={chosen}: the {chosen} kernel of {operation} does not do {obstacle}; unset {ENVIRONMENT} "
            "to let the reference take such calls"
        )
    return "torch"


def kernel(operation: str, backend: str) -> Callable[..., Any]:
    """The function that implements `operation` in `backend`, imported when first asked for."""
    modules = _modules(operation)
    if backend not in modules:
        raise ValueError(f"{operation} has no {backend} implementation, only {', '.join(modules)}")
    return _function(modules[backend], operation)


def explain(operation: str, device: torch.device | str = "cpu") -> Choice:
    """`choose` together with the reason."""
    kind = device.type if isinstance(device, torch.device) else device.split(":")[0]
    return _explain(operation, kind, os.environ.get(ENVIRONMENT, "auto").lower())


@functools.cache  # a layer asks for every product
def _explain(operation: str, kind: str, wanted: str) -> Choice:
    modules = _modules(operation)
    if wanted not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT}={wanted}: expected one of {', '.join(BACKENDS)}")
    forced = wanted != "auto"
    backend = wanted if forced else NATIVE.get(kind, "torch")
    if backend not in modules:
        return Choice(operation, kind, "torch", f"{operation} has no {backend} implementation")
    if backend != "torch" and _version(backend) is None:
        if forced:
            raise RuntimeError(f"{ENVIRONMENT}={wanted}: {wanted} is not installed; pip install 'minicpm_ref[kernels]'")
        return Choice(operation, kind, "torch", f"{backend} is not installed")
    if forced:
        return Choice(operation, kind, backend, f"{ENVIRONMENT}={wanted}")
    if backend == "torch":
        return Choice(operation, kind, backend, f"no kernels for {kind} devices")
    return Choice(operation, kind, backend, f"{backend} {_version(backend)} on a {kind} device")


def compiled_engine() -> ModuleType:
    """The package of the compiled CPU engine. Raises RuntimeError where numba or the kernels are not installed."""
    if _version("numba") is None:
        raise RuntimeError("the compiled engine needs numba: pip install 'minicpm_ref[kernels]'")
    return importlib.import_module("minicpm_kernels.engine")


def describe() -> list[Choice]:
    """What would run on the devices of this machine, a row an operation and device."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = [explain(operation, device) for operation in OPERATIONS for device in devices]
    return [row._replace(reason=row.reason + _instruction_set(row) + _limits(row)) for row in rows]


def _modules(operation: str) -> dict[str, str]:
    """Backend -> module that holds the function of that name."""
    if operation not in OPERATIONS:
        raise ValueError(f"operation {operation!r}: expected one of {', '.join(OPERATIONS)}")
    kernels = {language: kernel.module for language, kernel in _kernels(operation).items()}
    return {"torch": OPERATIONS[operation]} | kernels


@functools.cache
def _kernels(operation: str) -> dict[str, Any]:
    """Backend -> entry of `minicpm_kernels.registry`, if that package is there."""
    if importlib.util.find_spec("minicpm_kernels") is None:
        return {}
    registry = importlib.import_module("minicpm_kernels.registry")  # imports neither triton nor numba
    return {kernel.language: kernel for kernel in registry.KERNELS if kernel.name == operation}


def _limits(row: Choice) -> str:
    """Which calls the reference takes although a kernel was chosen."""
    if row.backend == "torch":
        return ""
    kernel = _kernels(row.operation)[row.backend]
    limits = [*([] if kernel.gradients else ["gradients"]), "float64", *([kernel.limit] if kernel.limit else [])]
    return f"; the reference takes {', '.join(limits)}"


def _instruction_set(row: Choice) -> str:
    """What a numba kernel found this CPU to be capable of."""
    if row.backend != "numba":
        return ""
    return f", {importlib.import_module(_modules(row.operation)['numba']).INSTRUCTION_SET}"


@functools.cache
def _function(module: str, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _version(package: str) -> str | None:
    """The installed version, or None; does not import the package.

    The distribution may bear another name than the module: `triton` also comes as triton-windows, say.
    """
    if importlib.util.find_spec(package) is None or importlib.util.find_spec("minicpm_kernels") is None:
        return None
    distributions = importlib.metadata.packages_distributions().get(package, ())
    return importlib.metadata.version(distributions[0]) if distributions else "of unknown version"
