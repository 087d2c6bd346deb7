"""The numeric tests on processors that this machine is not: `make test-numerics`.

The problem: how far a float32 sum strays depends on its order, and the order depends on the vector width, the library
and the number of threads. A bound that was tuned on one machine fails on the next, where nobody knows why.

The idea: most of a processor's habits can be put on by name. torch, MKL, oneDNN, OpenBLAS and numba each read an
environment variable that picks the code for an older, wider or other processor. So the same tests run once for each
row of `SETTINGS`, each in processes of its own, and the mistakes planted in `test_planted.py` must be caught in each.

A setting is tried first, in a child process (`--probe`), which computes some sums and prints what the libraries say
they use, together with a digest of all bits. Then it may turn out that
- the child dies, as of an instruction that this processor lacks: the setting is skipped and the death is the reason;
- the digest is that of a setting before it: the library did not listen, or has nothing else for this processor. The
  setting would test nothing twice, so it is skipped, and the reason names the twin.

`--half` is what CI runs. The rule: of the settings that this machine has, without the first (which is how every other
lane runs), the odd or the even ones, by the last bit of the commit's hash. So consecutive commits see both halves, and
a commit sees the same half whenever it is run. It leaves out the rows of `test_reference.py` that are interpreted.

Left out: other compilers' code (a wheel is what it is), and flags that trade exactness for speed, which nobody sets.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = ROOT / "build" / "numerics"  # machine code of numba, one folder for each target; ignored by git

TESTS = (
    "tests/numerics/test_planted.py",
    "tests/kernels/test_reference.py",
    "tests/kernels/sparse/test_attention.py",
    "tests/kernels/sparse/test_cpu.py",
    "tests/kernels/lowbit/test_ternary_cpu.py",
    "tests/unit/test_model.py",
    "tests/unit/sparse/test_properties.py",
    "tests/unit/lowbit/test_ternary.py",
)
NUMERIC = "not refuse and not checked and not compiles"  # the words of tests that judge no number
INTERPRETED = "kernel_equals_reference and triton"  # slow; `--half` leaves them to the other lanes
NOTEBOOKS = ("notebooks/01_inside_the_decoder.ipynb", "notebooks/06_block_sparse_attention.ipynb")
NBVAL = ("--nbval", "--nbval-current-env", "--nbval-cell-timeout=300")

# What an x86 processor without AVX-512, or without AVX2 (and what came with it), does not have, as LLVM names it.
AVX2 = ("avx", "avx2", "fma", "f16c", "bmi", "bmi2", "vaes", "vpclmulqdq", "avxvnni", "avxifma", "avxneconvert")


@dataclass(frozen=True)
class Setting:
    """One row: the environment variables that stand for another processor, and whether numba compiles without
    the features that begin with one of `without`."""

    name: str
    variables: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()


def _threads(count: int) -> Setting:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    # more threads than cores: MKL must not lower the number, and those that wait must not spin
    more = {"MKL_DYNAMIC": "FALSE", "OMP_WAIT_POLICY": "PASSIVE"} if count > 1 else {}
    return Setting(f"threads-{count}", dict.fromkeys(names, str(count)) | more)


SETTINGS = (
    _threads(1),  # how every other lane runs
    Setting("aten-default", {"ATEN_CPU_CAPABILITY": "default"}),
    Setting("openblas-haswell", {"OPENBLAS_CORETYPE": "Haswell"}),
    Setting("aten-avx2", {"ATEN_CPU_CAPABILITY": "avx2"}),
    Setting("openblas-skylakex", {"OPENBLAS_CORETYPE": "SkylakeX"}),
    Setting("aten-avx512", {"ATEN_CPU_CAPABILITY": "avx512"}),
    Setting("openblas-zen", {"OPENBLAS_CORETYPE": "Zen"}),
    Setting("mkl-compatible", {"MKL_CBWR": "COMPATIBLE"}),
    Setting("mkl-avx2", {"MKL_CBWR": "AVX2"}),
    Setting("mkl-sse4", {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}),
    Setting("onednn-avx2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    Setting("numba-without-avx512", {"NUMBA_CPU_NAME": "haswell"}, without=("avx512",)),
    Setting("numba-without-avx2", {"NUMBA_CPU_NAME": "nehalem"}, without=("avx512", *AVX2)),
    _threads(2),
    _threads(4),
)


def features() -> list[tuple[str, bool]]:
    """(feature, whether this processor has it), as LLVM names them."""
    from llvmlite import binding

    return sorted(binding.get_host_cpu_features().items())


def environment(setting: Setting) -> dict[str, str]:
    """The variables of a child process: this one's, without any that a setting names, and with those of `setting`."""
    named = {name for each in SETTINGS for name in each.variables} | {"NUMBA_CPU_FEATURES"}
    result = {name: value for name, value in os.environ.items() if name not in named}
    result |= SETTINGS[0].variables | setting.variables
    if setting.without:
        kept = {name: has and not name.startswith(setting.without) for name, has in features()}
        result["NUMBA_CPU_FEATURES"] = ",".join(("+" if has else "-") + name for name, has in kept.items())
    target = setting.name if setting.without else "native"
    return result | {"NUMBA_CACHE_DIR": str(SCRATCH / target), "TRITON_INTERPRET": "1"}


def probe() -> dict[str, Any]:
    """What the libraries of this process use, and a digest of what they compute."""
    import numpy as np
    import torch

    digest = hashlib.sha256()
    draw = torch.Generator().manual_seed(0)
    for rows, inner, columns in ((1, 64, 192), (5, 129, 33), (113, 320, 256), (512, 384, 512)):
        a, b = (torch.randn(shape, generator=draw) for shape in ((rows, inner), (inner, columns)))
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            x, y = a.to(dtype), b.to(dtype)
            results = [x @ y, torch.bmm(x.expand(3, -1, -1), y.expand(3, -1, -1)), x.sum(-1), x.exp().mean(), x.erf()]
            results += [x.softmax(-1), x.logsumexp(-1), torch.nn.functional.silu(x), x.cos(), x.square().mean(-1)]
            for result in results:
                digest.update(result.double().numpy().tobytes())
        q = torch.randn(1, 4, rows, 16, generator=draw)
        attended = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        digest.update(attended.numpy().tobytes())
        for x, y in ((a.numpy(), b.numpy()), (a.double().numpy(), b.double().numpy())):
            digest.update((x @ y).tobytes() + (x @ y[:, 0]).tobytes() + x.sum(-1).tobytes() + np.exp(x).tobytes())
    found = {
        "torch": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "bits": digest.hexdigest()[:16],
    }
    if "NUMBA_CPU_NAME" in os.environ:
        import numba

        from minicpm_kernels.lowbit.ternary_cpu import SUPPORTED
        from minicpm_kernels.sparse.cpu import INSTRUCTION_SET

        numba.njit(lambda x: (x * x).sum())(np.ones(100, np.float32))  # that its code for this target runs here
        found |= {"numba": [INSTRUCTION_SET, *SUPPORTED]}
    return found


def try_setting(setting: Setting) -> tuple[dict[str, Any] | None, str]:
    """(what `probe` found in a child process with this setting, ""), or (None, why it cannot run here)."""
    if setting.without and not any(has for name, has in features() if name.startswith(setting.without)):
        return None, f"this processor has no {setting.without[0]}"
    command = [sys.executable, __file__, "--probe"]
    done = subprocess.run(command, env=environment(setting), cwd=ROOT, capture_output=True, text=True)
    if done.returncode < 0:
        died = signal.Signals(-done.returncode).name
        lacks = ": this processor lacks its instructions" if died == "SIGILL" else ""
        return None, f"the process dies of {died}{lacks}"
    if done.returncode:
        return None, "the process fails: " + (done.stderr.strip().splitlines() or ["without a word"])[-1]
    return json.loads(done.stdout.splitlines()[-1]), ""


def available(workers: int) -> tuple[list[Setting], dict[str, str]]:
    """The settings that this machine has and that differ from one another; and for the others the reason."""
    found: dict[str, Setting] = {}  # what a probe printed -> the first setting that made it do so
    reasons: dict[str, str] = {}
    with ThreadPoolExecutor(workers) as pool:
        for setting, (result, reason) in zip(SETTINGS, pool.map(try_setting, SETTINGS), strict=True):
            twin = setting if result is None else found.setdefault(json.dumps(result), setting)
            if result is None or twin is not setting:
                reasons[setting.name] = reason or f"the same bits as {twin.name}"
            else:
                print(f"{setting.name:22} {result}", flush=True)
    return list(found.values()), reasons


def half(settings: list[Setting], commit: str) -> list[Setting]:
    """Every second setting after the first, beginning by the last bit of the commit's hash."""
    return settings[1:][int(commit[-1], 16) % 2 :: 2]


def commit_hash() -> str:
    """The hash of the commit that is checked out; "0" outside a checkout."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "0"


def run(setting: Setting, chosen: str) -> tuple[Setting, int, float, str]:
    """(setting, exit code, seconds, output) of the `chosen` (pytest's -k) numeric tests and of the notebooks."""
    start = time.monotonic()
    quiet = ("-q", "--no-header", "-p", "no:cacheprovider", "--durations=5")
    sanitize = f"--nbval-sanitize-with={ROOT / 'tests' / 'notebooks' / 'sanitize.cfg'}"
    # the tests first: tests/conftest.py sets what the notebooks' kernels inherit
    command = [sys.executable, "-m", "pytest", *TESTS, *NOTEBOOKS, *NBVAL, sanitize, "-k", chosen, *quiet]
    done = subprocess.run(command, env=environment(setting), cwd=ROOT, capture_output=True, text=True)
    return setting, done.returncode, time.monotonic() - start, done.stdout + done.stderr


def main() -> int:
    """Try every setting, run the tests under those that this machine has, print a line for each; 1 if one failed."""
    parser = argparse.ArgumentParser(description="Run the numeric tests under settings of other processors.")
    parser.add_argument(
        "--half", action="store_true", help="half of the settings, by the commit's hash, and the quicker tests"
    )
    parser.add_argument("--only", metavar="SETTING", action="append", choices=[s.name for s in SETTINGS])
    parser.add_argument("--list", action="store_true", help="try the settings and run nothing")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        print(json.dumps(probe()))
        return 0
    settings, reasons = available(options.workers)
    if options.half:
        settings = half(settings, commit_hash())
    if options.only:
        settings = [setting for setting in settings if setting.name in options.only]
        reasons = {name: reason for name, reason in reasons.items() if name in options.only}
    for name, reason in reasons.items():
        print(f"{name:22} skipped: {reason}", flush=True)
    if options.list:
        return 0
    chosen = f"{NUMERIC} and not ({INTERPRETED})" if options.half else NUMERIC
    failed = []
    with ThreadPoolExecutor(options.workers) as pool:
        for setting, code, seconds, output in pool.map(run, settings, [chosen] * len(settings)):
            if code:
                failed.append(setting.name)
                print(output)
            last = (output.strip().splitlines() or ["no output"])[-1]
            print(f"{setting.name:22} {'FAILED' if code else 'passed'} {seconds:.0f} s  {last}", flush=True)
    if failed:
        print(f"numeric tests fail under {', '.join(failed)}; one alone: python {sys.argv[0]} --only {failed[0]}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
