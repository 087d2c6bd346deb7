"""How this project measures: what is recorded, how it is timed, and how a result reaches figures/data.

The problem: a timing without its machine, versions and settings cannot be compared with anything, and a timing loop
that reads the same small buffers again and again measures the cache. One that times A first and B later measures the
machine's mood.

The ideas:
- rotation: enough copies of the inputs that together they exceed three times the last cache; each call takes the next
  one;
- interleaving: A B C, B C A, C A B: every round times every candidate, starting with another one, so drift hits all
  alike;
- a median over the rounds, with minimum, maximum and the 20th and 80th percentile beside it: the spread is part of
  the result;
- CUDA graphs for short kernels, so that the GPU's work is timed and not Python's launching;
- correctness first: `measure` judges every candidate against the reference, and a wrong one raises instead of
  printing a time;
- one JSON a benchmark with device, versions, settings, date, git commit and command line, written under a temporary
  name and then renamed, so that a figure never meets half a file.

Left out: clock pinning and power limits; the clocks of a GPU right after the run are recorded instead.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from minicpm_kernels import testing
from minicpm_ref.machine import cpu_name

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "figures" / "data"
PACKAGES = ("torch", "triton", "numba", "numpy", "minicpm_ref")


def record_device(device: str) -> dict[str, Any]:
    """The machine in words: CPU model, cores and threads; for "cuda" the GPU, its memory, its driver and its clocks
    now."""
    found: dict[str, Any] = {
        "type": device,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cache_bytes": properties.L2_cache_size,
            "clocks": query_gpu("clocks.sm,clocks.mem"),
            "driver": query_gpu("driver_version"),
        }
    else:
        found["name"] = found["cpu"]
    return found


def query_gpu(fields: str) -> str | None:
    """What nvidia-smi says about `fields`; None on machines that have none (AMD)."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def record_versions() -> dict[str, str | None]:
    """Python, CUDA and the packages that a timing depends on; None for one that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def record_commit() -> str | None:
    """The git commit of this checkout, with "-dirty" when files differ from it; None outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def command_line() -> str:
    """The command, with paths relative to the repository: what somebody else would type."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    return " ".join(["python", shown, *sys.argv[1:]])


def write_results(
    name: str, device: str, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], folder: Path = DATA
) -> Path:
    """Write figures/data/<name>.json: the rows and everything that a reader needs to judge them. Returns the path.

    Raises ValueError for no rows and for numbers that are not finite, which JSON cannot hold.
    """
    if not rows:
        raise ValueError(f"benchmark {name!r} has no rows")
    result = {
        "name": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": record_device(device),
        "versions": record_versions(),
        "settings": dict(settings),
        "git_commit": record_commit(),
        "command": command_line(),
        "rows": [dict(row) for row in rows],
    }
    text = json.dumps(result, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def cache_bytes(device: str) -> int:
    """The size of the last cache: asked of a GPU; for a CPU a generous 64 MiB, which torch cannot ask for."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 64 * 2**20


def rotation(arguments: tuple[Any, ...], device: str, at_most: int = 64) -> list[tuple[Any, ...]]:
    """Copies of `arguments` whose tensors together exceed three times the last cache, but never more than
    `at_most`."""
    size = sum(a.numel() * a.element_size() for a in arguments if isinstance(a, torch.Tensor))
    count = max(2, min(at_most, -(-3 * cache_bytes(device) // max(size, 1))))
    copies = [tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments) for _ in range(count - 1)]
    return [arguments, *copies]


def time_once(function: Callable[..., Any], buffers: Sequence[tuple[Any, ...]], device: str) -> float:
    """Seconds a call, averaged over one pass through `buffers`."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for arguments in buffers:
            function(*arguments)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(buffers)
    begin = time.perf_counter()
    for arguments in buffers:
        function(*arguments)
    return (time.perf_counter() - begin) / len(buffers)


def graphed(function: Callable[..., Any], buffers: Sequence[tuple[Any, ...]]) -> Callable[[], None]:
    """One CUDA graph that calls `function` on every buffer in turn. Compile and warm up before: a graph cannot."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for arguments in buffers[:2]:
            function(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in buffers:
            function(*arguments)
    return graph.replay


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, minimum, maximum, 20th and 80th percentile, in microseconds."""
    micro = sorted(1e6 * s for s in seconds)
    cuts = statistics.quantiles(micro, n=5, method="inclusive") if len(micro) > 1 else [micro[0]] * 4
    return {
        "median_us": statistics.median(micro),
        "min_us": micro[0],
        "max_us": micro[-1],
        "p20_us": cuts[0],
        "p80_us": cuts[-1],
    }


def measure(
    candidates: Mapping[str, Callable[..., Any]],
    reference: Callable[..., Any],
    arguments: tuple[Any, ...],
    device: str,
    rounds: int = 20,
    use_graph: bool = True,
    clock: Callable[[Callable[..., Any], Sequence[tuple[Any, ...]], str], float] = time_once,
) -> dict[str, dict[str, float]]:
    """Time every candidate on the same inputs. Returns name -> `summary`.

    Each candidate is judged against `reference` in float64 first (AssertionError when it is wrong), which also
    compiles and warms it up. `use_graph` matters on CUDA only.
    """
    expected = reference(*[testing.upcast(value) for value in arguments])
    for name, function in candidates.items():
        testing.assert_close(function(*arguments), expected, what=name)
    buffers = rotation(arguments, device)
    calls: dict[str, tuple[Callable[..., Any], Sequence[tuple[Any, ...]], int]] = {}
    for name, function in candidates.items():
        if device == "cuda" and use_graph:
            calls[name] = (graphed(function, buffers), [()], len(buffers))
        else:
            calls[name] = (function, buffers, 1)
    for function, prepared, _ in calls.values():
        clock(function, prepared, device)  # one pass that is thrown away
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            function, prepared, inside = calls[name]
            samples[name].append(clock(function, prepared, device) / inside)
    return {name: summary(seconds) for name, seconds in samples.items()}
