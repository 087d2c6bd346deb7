"""ggml's matrix product as a peer: its quantized types, called through ctypes from a package on PyPI.

The problem: ggml is what people run ternary weights with on a CPU (TQ1_0, TQ2_0), and no package on PyPI is ggml
itself. The idea: packages that bundle it export its C functions, and these suffice: fill a context with weights,
build a graph of one `mul_mat`, compute it. What is timed is `ggml_graph_compute`, which quantizes the activations,
too.

Known packages: pywhispercpp (shared libraries beside the package) and xllamacpp (one extension module). Neither is
needed; the benchmark says which one it found, its version, and the instruction sets it was compiled for, because that
decides its speed: wheels are built for AVX2. ggml's ternary dot products are written for AVX2 and no more, so they
lose nothing by that; its Q4_0 could be faster in a build of one's own.

Left out: repacked Q4_0 weights (an extra buffer type that needs the backend interface).
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint8, c_void_p
from importlib import metadata
from typing import Any

import numpy as np
import torch

PACKAGES = {  # distribution -> parts of the names of the libraries to load, in this order; the newest ggml first
    "xllamacpp": ("xllamacpp/xllamacpp.",),
    "pywhispercpp": (".libs/libggml-base-", ".libs/libggml-cpu-"),
}
TYPES = {"Q4_0": 2, "TQ1_0": 34, "TQ2_0": 35}  # enum ggml_type; float32 is 0
FEATURES = ("avx2", "fma", "f16c", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "llamafile")
SLACK = 1 << 12  # bytes for the header and the alignment of a tensor, generously


class _InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Plan(Structure):
    """struct ggml_cplan; what stands after the callback differs between versions, hence the room at the end."""

    _fields_ = (
        ("work_size", c_size_t),
        ("work_data", POINTER(c_uint8)),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("later_fields", c_uint8 * 64),
    )


FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {  # name -> (result, arguments)
    "ggml_init": (c_void_p, (_InitParams,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_get_data": (c_void_p, (c_void_p,)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph_custom": (c_void_p, (c_void_p, c_size_t, c_bool)),
    "ggml_graph_overhead_custom": (c_size_t, (c_size_t, c_bool)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_quantize_chunk": (
        c_size_t,
        (c_int, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)),
    ),
    "ggml_version": (c_char_p, ()),
    "ggml_cpu_init": (None, ()),
    "ggml_graph_plan": (_Plan, (c_void_p, c_int, c_void_p)),
    "ggml_graph_compute": (c_int, (c_void_p, POINTER(_Plan))),
    **{f"ggml_cpu_has_{feature}": (c_int, ()) for feature in FEATURES},
}


class Ggml:
    """The library of one installed package."""

    def __init__(self, package: str):
        libraries = [ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL) for path in _library_paths(package)]
        for name, (result, arguments) in FUNCTIONS.items():
            function = next(getattr(library, name) for library in libraries if hasattr(library, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.call("ggml_cpu_init")
        self.description = {
            "package": f"{package} {metadata.version(package)}",
            "ggml": self.call("ggml_version").decode(),
            "compiled_for": [feature for feature in FEATURES if self.call(f"ggml_cpu_has_{feature}")],
        }

    def call(self, name: str, *arguments: Any) -> Any:
        return getattr(self, name)(*arguments)

    def quantize(self, weight: torch.Tensor, kind: str) -> np.ndarray:
        """weight float32 [out, in] in one of `TYPES`, as bytes."""
        rows, columns = weight.shape
        source = np.ascontiguousarray(weight.numpy(), np.float32)
        packed = np.empty(rows * self.call("ggml_row_size", TYPES[kind], columns), np.uint8)
        pointer = source.ctypes.data_as(POINTER(c_float))
        written = self.call("ggml_quantize_chunk", TYPES[kind], pointer, packed.ctypes.data, 0, rows, columns, None)
        if written != packed.nbytes:
            raise RuntimeError(f"ggml wrote {written} bytes of {kind}, expected {packed.nbytes}")
        return packed


class GgmlProduct:
    """x [tokens, in] times one of several copies of a quantized weight [out, in]."""

    def __init__(
        self, ggml: Ggml, packed: np.ndarray, kind: str, x: torch.Tensor, rows: int, copies: int, threads: int
    ):
        tokens, columns = x.shape
        graph_bytes = ggml.call("ggml_graph_overhead_custom", 8, False)
        size = copies * (packed.nbytes + 4 * tokens * rows + graph_bytes + 3 * SLACK) + 4 * tokens * columns + SLACK
        self.memory = np.empty(size, np.uint8)  # numpy asks for huge pages, as the other candidates have
        self.ggml, self.shape = ggml, (tokens, rows)
        self.context = ggml.call("ggml_init", _InitParams(size, self.memory.ctypes.data, False))
        activations = self._tensor(0, columns, tokens, np.ascontiguousarray(x.numpy()))
        self.graphs, self.outputs = [], []
        for _ in range(copies):
            output = ggml.call(
                "ggml_mul_mat", self.context, self._tensor(TYPES[kind], columns, rows, packed), activations
            )
            graph = ggml.call("ggml_new_graph_custom", self.context, 8, False)
            ggml.call("ggml_build_forward_expand", graph, output)
            self.graphs.append(graph)
            self.outputs.append(ggml.call("ggml_get_data", output))
        self.plan = ggml.call("ggml_graph_plan", self.graphs[0], threads, None)
        self.work = np.empty(max(1, self.plan.work_size), np.uint8)
        self.plan.work_data = self.work.ctypes.data_as(POINTER(c_uint8))

    def __call__(self, copy: int) -> None:
        self.ggml.call("ggml_graph_compute", self.graphs[copy], byref(self.plan))

    def output(self, copy: int) -> torch.Tensor:
        """The result of the last call for this copy, [tokens, out]."""
        data = (c_float * (self.shape[0] * self.shape[1])).from_address(self.outputs[copy])
        return torch.from_numpy(np.frombuffer(data, np.float32).reshape(self.shape).copy())

    def close(self) -> None:
        """Give the memory back."""
        self.ggml.call("ggml_free", self.context)
        del self.memory

    def _tensor(self, kind: int, columns: int, rows: int, data: np.ndarray) -> int:
        tensor: int = self.ggml.call("ggml_new_tensor_2d", self.context, kind, columns, rows)
        ctypes.memmove(self.ggml.call("ggml_get_data", tensor), data.ctypes.data, data.nbytes)
        return tensor


def find_ggml() -> Ggml | None:
    """The first of `PACKAGES` that is installed, or None."""
    for package in PACKAGES:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        return Ggml(package)
    return None


def _library_paths(package: str) -> list[str]:
    files = metadata.files(package) or []
    found = []
    for part in PACKAGES[package]:
        paths = [str(file.locate()) for file in files if part in file.as_posix() and ".so" in file.name]
        if len(paths) != 1:
            raise RuntimeError(
                f"{package} {metadata.version(package)}: {len(paths)} files like {part}*.so, expected one"
            )
        found += paths
    return found
