"""Which kernel stands for which reference, and with which settings it must compile.

The problem: a kernel without a reference cannot be judged, and one that nobody compiles for a GPU is only a Python
program.
The idea: one table. Tests, benchmarks and the ahead-of-time compiler walk `KERNELS`, and a test fails when a
public function of this package is missing from it. The entries are strings, so reading the table imports neither
triton nor numba nor the kernels.

How each entry is proven: against its reference in Triton's interpreter on every row of the case table (numba: as
compiled), and compiled ahead of time for every `CompileConfig` in its module's `COMPILE_CONFIGS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Kernel:
    """One fast function.

    `name` is the function's name here, in the reference and in the case table; it may stand here once for each
    language. `module` holds the kernel, `reference` is the module of the function that it must equal. `parts` are
    modules with pieces of it, which nothing else launches: jitted functions, and unchecked functions that launch
    them. `softmax` says that the first two arguments are q and k, whose products are exponentiated: the judge then
    allows for units in the last place of the largest logit. `gradients`: whether it is differentiable (or has nothing
    to differentiate), `limit`: which other calls it refuses, in words.
    """

    name: str
    module: str
    reference: str
    language: Literal["triton", "numba"]
    dtypes: tuple[str, ...] = ("float32", "float16")  # of the float arguments, in tests without a GPU
    parts: tuple[str, ...] = ()
    softmax: bool = False
    gradients: bool = False
    limit: str = ""


NVIDIA = ("sm_80", "sm_90")
TARGETS = (*NVIDIA, "gfx942")  # the GPUs that kernels are compiled for without having one; see `aot`


@dataclass(frozen=True)
class CompileConfig:
    """One way in which a jitted Triton function must compile.

    - kernel: the public function that launches it (`Kernel.name`)
    - function: the jitted function in the same module, or in one of its parts
    - label: short name of the configuration, unique for its function
    - signature: argument -> Triton type ("*bf16", "*fp32", "*i32", "i32", "fp32"), for all that are not constexpr
    - constexprs: argument -> value
    - aligned: integer arguments that are multiples of 16 at launch; Triton compiles that case apart, with wide loads
    - num_warps, num_stages: as at launch
    - spills: register spills (instructions that store and reload) to accept; 0 unless a reason stands beside it
    - targets: where it is launched; NVIDIA alone for inline assembly
    - fp_fusion: whether the compiler may fuse multiplications and additions, as at launch
    """

    kernel: str
    function: str
    label: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, object] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    spills: int = 0
    targets: tuple[str, ...] = TARGETS
    fp_fusion: bool = True


_GROUPS = "group sizes other than 128"

KERNELS: tuple[Kernel, ...] = (
    Kernel("rms_norm", "minicpm_kernels.ops", "minicpm_ref.ops", "triton"),
    Kernel("add_rms_norm", "minicpm_kernels.ops", "minicpm_ref.ops", "triton"),
    Kernel(
        "ternary_matmul", "minicpm_kernels.lowbit.ternary_triton", "minicpm_ref.lowbit.ternary", "triton", limit=_GROUPS
    ),
    Kernel(
        "ternary_matmul_int8",
        "minicpm_kernels.lowbit.ternary_cpu",
        "minicpm_ref.lowbit.ternary",
        "numba",
        limit=_GROUPS,
    ),
    Kernel(
        "ternary_matmul_int8",
        "minicpm_kernels.lowbit.ternary_triton_int8",
        "minicpm_ref.lowbit.ternary",
        "triton",
        limit=_GROUPS,
    ),
    Kernel("compress_keys", "minicpm_kernels.sparse.blocks", "minicpm_ref.sparse.blocks", "triton"),
    # lists of 16-bit inputs hang on rounding: sparse/test_blocks.py compares the scores of what was chosen
    Kernel(
        "select_blocks",
        "minicpm_kernels.sparse.blocks",
        "minicpm_ref.sparse.blocks",
        "triton",
        ("float32",),
        gradients=True,
    ),
    Kernel(
        "sparse_attention",
        "minicpm_kernels.sparse.attention",
        "minicpm_ref.sparse.attention",
        "triton",
        parts=tuple(f"minicpm_kernels.sparse.{part}" for part in ("one_token", "union", "backward")),
        softmax=True,
        gradients=True,
    ),
    # as above
    Kernel(
        "select_blocks",
        "minicpm_kernels.sparse.cpu",
        "minicpm_ref.sparse.blocks",
        "numba",
        ("float32",),
        gradients=True,
    ),
    Kernel("sparse_attention", "minicpm_kernels.sparse.cpu", "minicpm_ref.sparse.attention", "numba", softmax=True),
    Kernel(
        "sparse_tree_attention",
        "minicpm_kernels.sparse.tree",
        "minicpm_ref.sparse.tree",
        "triton",
        parts=("minicpm_kernels.sparse.one_token",),
        softmax=True,
    ),
)
