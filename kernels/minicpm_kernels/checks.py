"""What every wrapper asks of its arguments before it launches a kernel, with errors that say what was expected.

A kernel indexes raw memory: a wrong shape, a stride that is not the assumed one, or a tensor on another device is not
an exception there but a wrong result. So the wrappers ask first. `name` is the argument's name, as the caller wrote
it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, as Python on the CPU (TRITON_INTERPRET=1 before the import)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def on_nvidia() -> bool:
    """Whether kernels run on an NVIDIA GPU, so that they may hold PTX: not on AMD's, and not in the interpreter."""
    return not interpreting() and torch.version.hip is None


def require_tensor(
    function: str,
    name: str,
    value: torch.Tensor,
    shape: Sequence[int] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> None:
    """Ask that `value` is a contiguous tensor of this shape, one of these dtypes, on this device (each unless None).

    Raises ValueError naming the function, the argument, what it is and what was expected.
    """
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{function}: {name} is a {type(value).__name__}, expected a tensor")
    if shape is not None and tuple(value.shape) != tuple(shape):
        raise ValueError(f"{function}: {name} has shape {list(value.shape)}, expected {list(shape)}")
    if dtypes is not None and value.dtype not in dtypes:
        raise ValueError(f"{function}: {name} is {value.dtype}, expected {' or '.join(map(str, dtypes))}")
    if device is not None and value.device != device:
        raise ValueError(f"{function}: {name} is on {value.device}, expected {device} like the first argument")
    if not value.is_contiguous():
        raise ValueError(
            f"{function}: {name} of shape {list(value.shape)} has strides {list(value.stride())}, expected a "
            f"contiguous tensor; call {name}.contiguous()"
        )


def require_runnable(function: str, *tensors: torch.Tensor) -> None:
    """Ask that a forward-only Triton kernel can run on these tensors here and now.

    Raises ValueError for CPU tensors without the interpreter and for bfloat16 in the interpreter, whose bfloat16
    arithmetic is wrong (it multiplies bit patterns in `tl.dot`); RuntimeError when a gradient would be needed.
    """
    first = tensors[0]
    if interpreting():
        if any(tensor.dtype == torch.bfloat16 for tensor in tensors):
            raise ValueError(
                f"{function}: bfloat16 is wrong in Triton's interpreter; use float16 or float32, or run on a GPU "
                "without TRITON_INTERPRET=1"
            )
    elif first.device.type != "cuda":
        raise ValueError(
            f"{function}: the tensors are on {first.device}, expected a CUDA or ROCm device; on the CPU use the "
            "reference in minicpm_ref, or set TRITON_INTERPRET=1 before Python starts"
        )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"{function} computes no gradient; call it under torch.no_grad(), or use the reference in minicpm_ref"
        )
