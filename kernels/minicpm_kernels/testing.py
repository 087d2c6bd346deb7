"""How a kernel is judged: poisoned outputs, guarded inputs, and an error relative to the reference's size.

The problem: `torch.empty` often hands back memory that still holds the right answer of the previous call, a read past
the end often finds zeros, and an absolute tolerance says nothing when the outputs are 1e-3. Wrong kernels pass.

The ideas, each a few lines:
- `poisoned_memory()`: every `torch.empty` inside is filled with NaN (or the largest integer), so an output that a
  kernel forgets to write cannot look right. torch has this built in, as part of its deterministic mode.
- `guarded(tensor)`: the input stands between two stretches of NaN. A load that misses its mask poisons the result; a
  store that misses its mask changes the NaNs, which `Guard.check` sees.
- `assert_close`: max and root-mean-square error, both divided by the root mean square of the reference, each against
  a bound that comes from the number format. Rounding to nearest errs by at most half a unit in the last place, eps /
  2 relative to the *element*.
  - peak: an element of normal-distributed data stays below 8 RMS, so one rounding errs by at most 8 * eps / 2 = 4 eps
    of the RMS.
  - rms: rounding errors are uniform, so their RMS is about 0.2 eps; the bound 0.75 eps leaves room for a second
    rounding.
  - float32 results also carry the error of their float32 sums, which is not one rounding but a walk of many: 16 and 4
    eps.
  A kernel whose inner products are rounded on the way (bf16 operands, quantised activations) passes its own `Bound`,
  with the reason.

Left out: a statistical test. One wrong element in a million is caught by the peak, not by the rms; both are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Bound:
    """Largest accepted error relative to the reference's RMS: of the worst element, and root mean square of all."""

    peak: float
    rms: float

    def widened(self, factor: float) -> Bound:
        """This bound, `factor` times as wide."""
        return Bound(self.peak * factor, self.rms * factor)


def default_bound(dtype: torch.dtype) -> Bound:
    """The bound for a result computed in float32 and rounded to `dtype` once or twice; see the module docstring."""
    eps = torch.finfo(dtype).eps
    if dtype in (torch.float32, torch.float64):
        eps = torch.finfo(torch.float32).eps  # a float64 result may have gone through float32 arithmetic
        return Bound(peak=16 * eps, rms=4 * eps)
    return Bound(peak=4 * eps, rms=0.75 * eps)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, uninitialised tensors are filled with NaN, or with the largest value of an integer type."""
    was_on = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=was_warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = was_filling


@dataclass(frozen=True)
class Guard:
    """A copy of a tensor between two stretches of NaN; `tensor` is the view to hand to the kernel."""

    arena: torch.Tensor
    tensor: torch.Tensor
    original: torch.Tensor
    width: int

    def check(self) -> None:
        """Raises AssertionError if a kernel wrote before, into, or after the tensor."""
        before, after = self.arena[: self.width], self.arena[self.width + self.tensor.numel() :]
        if not (before.isnan().all() and after.isnan().all()):
            raise AssertionError(f"the kernel wrote outside its input of shape {list(self.tensor.shape)}")
        if not torch.equal(self.tensor, self.original):
            raise AssertionError(f"the kernel changed its input of shape {list(self.tensor.shape)}")


def guarded(tensor: torch.Tensor, width: int = 1024) -> Guard:
    """Copy a contiguous floating-point tensor into the middle of an arena of NaN.

    `width` elements stand on each side; a multiple of 64 keeps the 16-byte alignment that torch gives and kernels
    rely on.
    """
    arena = torch.full((tensor.numel() + 2 * width,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    view = arena[width : width + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return Guard(arena, view, tensor, width)


def _guardable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.is_contiguous()


def upcast(value: Any) -> Any:
    """Floating-point tensors to float64; everything else as it is."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """(peak, rms) of actual - expected over the finite elements of `expected`, divided by the RMS of those elements.

    Raises AssertionError if shapes differ, or if `actual` is not NaN or infinite exactly where `expected` is.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {list(actual.shape)}, expected {list(expected.shape)}")
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    finite = e.isfinite()
    if not torch.equal(a.isfinite(), finite) or not torch.equal(a[~finite].nan_to_num(), e[~finite].nan_to_num()):
        wrong = int((a.isfinite() != finite).sum())
        raise AssertionError(
            f"{wrong} of {a.numel()} elements are NaN or infinite where the reference is not, or the reverse"
        )
    a, e = a[finite], e[finite]
    if a.numel() == 0:
        return 0.0, 0.0
    size = e.square().mean().sqrt().item() or 1.0  # an all-zero reference is compared absolutely
    size = max(size, torch.finfo(actual.dtype).smallest_normal)  # numbers below it are as far apart as those above
    error = a - e
    return error.abs().max().item() / size, error.square().mean().sqrt().item() / size


def assert_close(actual: Any, expected: Any, bound: Bound | None = None, what: str = "result") -> None:
    """Assert that `actual` is as close to `expected` as its number format allows.

    Walks tuples, lists and mappings. Floating-point tensors are judged by `bound`, or by
    `default_bound(actual.dtype)`; integer and boolean tensors, strings and None must be equal; Python floats are
    compared at float32 precision.
    """
    if isinstance(expected, torch.Tensor):
        if not isinstance(actual, torch.Tensor):
            raise AssertionError(f"{what} is a {type(actual).__name__}, expected a tensor")
        if not expected.is_floating_point():
            if actual.shape != expected.shape or not torch.equal(actual.cpu().long(), expected.cpu().long()):
                raise AssertionError(f"{what} differs from the reference, and integers must be equal")
            return
        limit = bound or default_bound(actual.dtype)
        try:
            peak, rms = relative_error(actual, expected)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from None
        if not (peak <= limit.peak and rms <= limit.rms):
            raise AssertionError(
                f"{what}: error relative to the reference's RMS is {peak:.2e} at the worst element "
                f"(bound {limit.peak:.2e}) and {rms:.2e} in the mean square (bound {limit.rms:.2e})"
            )
    elif isinstance(expected, Mapping):
        if list(actual) != list(expected):
            raise AssertionError(f"{what} has keys {list(actual)}, expected {list(expected)}")
        for key in expected:
            assert_close(actual[key], expected[key], bound, f"{what}[{key!r}]")
    elif isinstance(expected, tuple | list):
        if len(actual) != len(expected):
            raise AssertionError(f"{what} has {len(actual)} parts, expected {len(expected)}")
        for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_close(one, other, bound, f"{what}[{i}]")
    elif isinstance(expected, float):
        if not math.isclose(actual, expected, rel_tol=2e-6, abs_tol=1e-12):
            raise AssertionError(f"{what} is {actual}, expected {expected}")
    elif actual != expected:
        raise AssertionError(f"{what} is {actual!r}, expected {expected!r}")


def check_kernel(
    kernel: Callable[..., Any], reference: Callable[..., Any], arguments: tuple[Any, ...], bound: Bound | None = None
) -> None:
    """Run `kernel` on guarded copies of `arguments` with poisoned memory and judge it against `reference` in float64.

    The reference sees the same, already rounded, inputs, so the bound covers the kernel's own arithmetic and nothing
    else.
    """
    expected = reference(*[upcast(value) for value in arguments])
    guards = {i: guarded(value) for i, value in enumerate(arguments) if _guardable(value)}
    with poisoned_memory():
        actual = kernel(*[guards[i].tensor if i in guards else value for i, value in enumerate(arguments)])
    for guard in guards.values():
        guard.check()
    assert_close(actual, expected, bound)
