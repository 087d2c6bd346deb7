"""How a kernel is judged: poisoned outputs, guarded inputs, and an error relative to the reference's size.

The problem: `torch.empty` often hands back memory that still holds the right answer of the previous call, a read past
the end often finds zeros, and an absolute tolerance says nothing when the outputs are 1e-3. Wrong kernels pass.

The ideas, each a few lines:
- `poisoned_memory()`: every `torch.empty` inside is filled with NaN (or the largest integer), so an output that a
  kernel forgets to write cannot look right. torch has this built in, as part of its deterministic mode.
- `guarded(tensor)`: the input stands between two stretches of NaN. A load that misses its mask poisons the result; a
  store that misses its mask changes the NaNs, which `Guard.check` sees.
- `assert_close`: max and root-mean-square error, both divided by the root mean square of the reference, each against
  a bound. Without another bound it is that of the number format. Rounding to nearest errs by at most half a unit in
  the last place, eps / 2 relative to the *element*.
  - peak: an element of normal-distributed data stays below 8 RMS, so one rounding errs by at most 8 * eps / 2 = 4 eps
    of the RMS.
  - rms: rounding errors are uniform, so their RMS is about 0.2 eps; the bound 0.75 eps leaves room for a second
    rounding.
  - float32 results also carry the error of their float32 sums, which is not one rounding but a walk of many: 16 and 4
    eps.
- `allowance`: how far a float32 sum strays depends on its order, and every processor, thread count and library has
  an order of its own. So no constant is measured on one machine and written down. The yardstick is the reference
  itself, run in the same dtype on the same machine: a twin may stray `PEAK_MULTIPLE` times as far from float64 as the
  reference does at the worst element (one draw from a long tail), `RMS_MULTIPLE` times in the mean square (an
  average), plus the bound of the format, plus `LOGIT_ULPS` units of the largest intermediate: a logit of 16 has
  errors of 16 eps, and its exponential turns them into relative errors of the weight.
- `check_kernel` does all of this at once: guards, poison, float64 oracle, and the reference in its own dtype.

A sum so ill-conditioned that its float32 says nothing (logits of 1e4) is judged in float64, where the bound of the
format is what float32 would have been allowed.

Left out: a statistical test. One wrong element in a million is caught by the peak, not by the rms; both are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

PEAK_MULTIPLE = 4.0  # of the reference's own error at its worst element: a maximum scatters
RMS_MULTIPLE = 2.0  # of the reference's own root-mean-square error: a mean hardly scatters
LOGIT_ULPS = 4.0  # units in the last place of the largest intermediate; a quarter of it in the mean square


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


def largest_logit(q: torch.Tensor, k: torch.Tensor) -> float:
    """The largest |q . k| / sqrt(D) of any query and any key, q [B, H, T, D] and k [B, G, S, D] in groups of heads.

    Keys that no query sees are counted, too: this is a size, not a result. NaN and infinities are left out.
    """
    B, H, T, D = q.shape
    grouped = q.nan_to_num(0, 0, 0).float().reshape(B, k.shape[1], -1, D)  # [B, G, H / G * T, D]
    keys = k.nan_to_num(0, 0, 0).float()
    largest = 0.0
    for piece in grouped.split(4096, dim=2):  # logits of a long text are not held at once
        largest = max(largest, (piece @ keys.mT).abs().max().item())
    return largest / math.sqrt(D)


def allowance(own: torch.Tensor, exact: torch.Tensor, largest: float = 1.0) -> Bound:
    """How far a twin may stray from `exact` (float64), where the reference in the same dtype strays to `own`.

    `largest` is the largest intermediate whose absolute error becomes a relative one, such as the largest logit of an
    attention (`largest_logit`). See the module docstring for the rule.
    """
    peak, rms = relative_error(own, exact)
    form = default_bound(own.dtype)
    ulp = LOGIT_ULPS * largest * torch.finfo(torch.float32).eps
    return Bound(PEAK_MULTIPLE * peak + form.peak + ulp, RMS_MULTIPLE * rms + form.rms + ulp / 4)


def assert_as_close(actual: Any, own: Any, exact: Any, largest: float = 1.0, what: str = "result") -> None:
    """Assert that `actual` is about as close to the float64 result `exact` as the reference's own result `own` is.

    The three have the same structure; tensors are judged by `allowance`, everything else as by `assert_close`.
    """
    if isinstance(exact, torch.Tensor) and exact.is_floating_point() and isinstance(own, torch.Tensor):
        assert_close(actual, exact, allowance(own, exact, largest), what)
    elif isinstance(exact, tuple | list):
        if len(actual) != len(exact):
            raise AssertionError(f"{what} has {len(actual)} parts, expected {len(exact)}")
        for i, parts in enumerate(zip(actual, own, exact, strict=True)):
            assert_as_close(*parts, largest, f"{what}[{i}]")
    else:
        assert_close(actual, exact, what=what)


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
    kernel: Callable[..., Any], reference: Callable[..., Any], arguments: tuple[Any, ...], largest: float = 1.0
) -> None:
    """Run `kernel` on guarded copies of `arguments` with poisoned memory and judge it against `reference` in float64.

    The reference sees the same, already rounded, inputs twice: in float64 it is the oracle, in the dtype of the
    arguments it says what that dtype allows (`allowance`, to which `largest` goes). Example:

        check_kernel(kernels.rms_norm, ops.rms_norm, case.build(torch.float16))
    """
    exact = reference(*[upcast(value) for value in arguments])
    own = reference(*arguments)
    guards = {i: guarded(value) for i, value in enumerate(arguments) if _guardable(value)}
    with poisoned_memory():
        actual = kernel(*[guards[i].tensor if i in guards else value for i, value in enumerate(arguments)])
    for guard in guards.values():
        guard.check()
    assert_as_close(actual, own, exact, largest)


def check_attention(kernel: Callable[..., Any], reference: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """`check_kernel` for functions whose first two arguments are q and k: their logits say what a bit is worth."""
    check_kernel(kernel, reference, arguments, largest_logit(*arguments[:2]))
