"""Compile kernels for GPUs that are not here, and read off what the compiler decided.

The problem: Triton's interpreter proves the arithmetic of a kernel, not that it compiles, fits into shared memory, or
keeps its values in registers; and a machine without a GPU never finds out.
The idea: Triton compiles to PTX and machine code without a driver when the target is named. The binary then answers:
- shared memory a program asks for, against the limit of the target (a launch beyond it fails);
- registers and spills: a value that does not fit in a register is written to memory and read back (LDL and STL in
  NVIDIA's machine code, counted by the `cuobjdump` that Triton brings along; AMD's compiler states its counts in the
  assembly);
- which tensor-core instructions were chosen: `mma.sync` on sm_80, `wgmma` on sm_90.

Run it: `python -m minicpm_kernels.aot` prints a table, `--kernel rms_norm` selects, `--ptx` prints the PTX instead.
It must run in a process without Triton's interpreter: unset TRITON_INTERPRET, or set it to 0.

Left out: speed. Static counts prove that resources suffice, not that the kernel is fast.
Sources: NVIDIA's CUDA C++ programming guide, table of technical specifications (shared memory per block); AMD CDNA 3
ISA, LDS.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minicpm_kernels.checks import interpreting
from minicpm_kernels.registry import KERNELS, CompileConfig

TRITON_KERNELS = [kernel for kernel in KERNELS if kernel.language == "triton"]


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and the shared memory that one program may have there, in bytes."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


TARGETS: dict[str, Target] = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}


@dataclass(frozen=True)
class Report:
    """What the compiler made of one configuration: registers a thread, spill instructions (AMD: spilled registers),
    bytes of shared memory, assembly (PTX or AMDGCN)."""

    registers: int
    spills: int
    shared: int
    assembly: str


def configs(kernel: str) -> tuple[CompileConfig, ...]:
    """The configurations in which the kernel named `kernel` must compile. Raises ValueError for an unknown name."""
    return tuple(config for module in _modules(kernel) for config in module.COMPILE_CONFIGS if config.kernel == kernel)


def compile_config(config: CompileConfig, target: Target) -> Report:
    """Compile one configuration for one target.

    Raises RuntimeError in a process that interprets kernels, and whatever Triton raises for a kernel that does not
    compile.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is set, so kernels are interpreted; compile in a process without it")
    function = next(
        getattr(module, config.function) for module in _modules(config.kernel) if hasattr(module, config.function)
    )
    names = function.arg_names
    source = ASTSource(
        function,
        signature={name: config.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in config.constexprs.items()},
        # as at launch: torch allocates on 16-byte boundaries at least, and some integers are multiples of 16
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in config.signature.items()
            if kind.startswith("*") or name in config.aligned
        },
    )
    compiled = triton.compile(
        source,
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options={
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": config.fp_fusion,
        },
    )
    if target.backend == "cuda":
        registers, spills = cuda_resources(compiled.asm["cubin"])
        return Report(registers, spills, compiled.metadata.shared, compiled.asm["ptx"])
    text = compiled.asm["amdgcn"]
    registers, spills = amd_resources(text)
    return Report(registers, spills, compiled.metadata.shared, text)


def _modules(kernel: str) -> list[Any]:
    """The module of a Triton kernel, and those of its parts."""
    for entry in TRITON_KERNELS:
        if entry.name == kernel:
            return [importlib.import_module(name) for name in (entry.module, *entry.parts)]
    raise ValueError(f"no kernel is called {kernel!r}; the registry has {[entry.name for entry in TRITON_KERNELS]}")


def cuda_resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, spill instructions) of NVIDIA machine code, read by cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, code = (
            subprocess.run([str(tool), flag, str(file)], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump -res-usage names no registers: {usage[:200]!r}")
    return int(found[1]), len(re.findall(r"\b(?:LDL|STL)\b", code))


def amd_resources(assembly: str) -> tuple[int, int]:
    """(vector registers a thread, spilled registers) as AMD's compiler states them in the metadata of the
    assembly."""
    counts: dict[str, int] = {}
    for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count"):
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        if not found:
            raise RuntimeError(f"the assembly's metadata has no .{name}")
        counts[name] = int(found[1])
    return counts["vgpr_count"], counts["vgpr_spill_count"] + counts["sgpr_spill_count"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minicpm_kernels.aot", description="compile kernels without a GPU")
    parser.add_argument("--kernel", choices=[kernel.name for kernel in TRITON_KERNELS], help="only this one")
    parser.add_argument("--target", choices=list(TARGETS), help="only this one")
    parser.add_argument("--label", help="only the configuration with this label")
    parser.add_argument("--ptx", action="store_true", help="print the assembly instead of the table")
    chosen: Any = parser.parse_args(arguments)
    if not chosen.ptx:
        print(f"{'kernel':<22} {'configuration':<16} {'target':<8} {'registers':>9} {'spills':>6} {'shared bytes':>12}")
    for entry in TRITON_KERNELS:
        if chosen.kernel not in (None, entry.name):
            continue
        for config in configs(entry.name):
            if chosen.label not in (None, config.label):
                continue
            for name, target in TARGETS.items():
                if name not in config.targets or chosen.target not in (None, name):
                    continue
                report = compile_config(config, target)
                if chosen.ptx:
                    print(report.assembly)
                else:
                    print(
                        f"{entry.name:<22} {config.label:<16} {name:<8} {report.registers:>9} {report.spills:>6} "
                        f"{report.shared:>12}"
                    )


if __name__ == "__main__":
    main()
