"""What this machine is and how fast it reads, for cards, records and limits: every number is kept with where it was
measured."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import torch


def machine(device: torch.device) -> dict[str, str]:
    """Where something ran: device, cores, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name. Raises ValueError when this machine, or this build of torch, does not have it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has no one way to say it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"device {str(name)!r} cannot be used here ({reason}); 'cpu' always can") from error
    return device


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; a CPU without such instructions emulates it several times
    slower."""
    return device.type != "cpu" or bool(torch.cpu._is_avx512_bf16_supported())


def cpu_name() -> str:
    """The processor's name, from the system where Python does not know it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def read_bandwidth() -> float:
    """Bytes per second at which this CPU sums 256 MB of floats: the best of five passes."""
    block = torch.ones(64 * 2**20)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - start)
    return block.nbytes / min(times)
