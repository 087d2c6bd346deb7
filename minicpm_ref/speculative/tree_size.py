"""How many tokens to draft: the size that a machine's own timings make best.

Problem. Checking n tokens in one pass is nearly free where a step waits for memory, and costs n steps where it does
arithmetic. So the same tree is a gain on a GPU with 16-bit weights and a loss on a small CPU with 4-bit ones. No rule
of thumb holds for both.

Idea. Measure T_verify(n), the time of one pass over n tokens, on this machine with these weights; know tau(n), the
tokens that a round with n verified tokens emits on average; take the n with the largest

    tau(n) / (T_draft(n) + T_verify(n)).

n = 1 is plain decoding (tau = 1, no draft), so a draft that does not pay loses to it by itself. Timings are kept in a
file by machine, threads and weights, since they take a second and change only with those.

Source: SpecMQuant, arXiv 2505.22179 (with 4-bit weights the best tree is much smaller).
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from minicpm_ref.files import write_text
from minicpm_ref.speculative.loop import Verifier

CACHE_VARIABLE = "XDG_CACHE_HOME"
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def measure_verify(
    executor: Verifier,
    sizes: Sequence[int] = SIZES,
    context: int = 128,
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Median seconds of one `verify` of n tokens behind `context` others, for each n of `sizes`.

    Uses row 0 and empties it. The sizes take turns, so that a disturbance meets all of them alike. Raises ValueError
    when the row cannot hold context and tokens.
    """
    if context + max(sizes) > executor.max_length:
        raise ValueError(f"context {context} and {max(sizes)} tokens exceed max_length = {executor.max_length}")
    token = executor.config.bos_token_id
    executor.truncate(0, 0)
    executor.prefill(0, [token] * context)
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(rounds + 1):
        for size in sizes:
            begin = clock()
            executor.verify(0, [token] * size)
            if turn:  # the first turn warms up
                seconds[size].append(clock() - begin)
            executor.truncate(0, context)
    executor.truncate(0, 0)
    return {size: statistics.median(times) for size, times in seconds.items()}


def cached_verify(key: str, measure: Callable[[], dict[int, float]], path: Path | None = None) -> dict[int, float]:
    """The timings stored under `key`, measured and stored if there are none yet.

    `key` must name all they depend on: machine, threads, weights and their format. `path` None is
    `minicpm_ref/verify_seconds.json` in the user's cache folder. A file that cannot be read as such is an error, not
    silently replaced.
    """
    if path is None:
        root = os.environ.get(CACHE_VARIABLE)
        path = (Path(root) if root else Path.home() / ".cache") / "minicpm_ref" / "verify_seconds.json"
    stored: dict[str, dict[str, float]] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if key not in stored:
        stored[key] = {str(size): seconds for size, seconds in measure().items()}
        write_text(path, json.dumps(stored, indent=1))
    return {int(size): seconds for size, seconds in stored[key].items()}


def seconds_at(measured: Mapping[int, float], size: int) -> float:
    """T_verify(size) from timings at other sizes: on the straight line between its neighbours, the last line going on.

    >>> seconds_at({1: 1.0, 2: 1.2, 4: 2.0}, 3)
    1.6
    """
    sizes = sorted(measured)
    if size in measured:
        return measured[size]
    if len(sizes) < 2 or size < sizes[0]:
        raise ValueError(f"size {size}: timings exist for {sizes} alone")
    above = next((i for i, known in enumerate(sizes) if known > size), len(sizes) - 1)
    low, high = sizes[above - 1], sizes[above]
    return measured[low] + (measured[high] - measured[low]) * (size - low) / (high - low)


def chain_gain(acceptance: Sequence[float]) -> list[float]:
    """tau of chains of 0, 1, ..., g drafts, where draft i is accepted with `acceptance[i]` if those before it were.

    >>> chain_gain([0.5, 0.5])
    [1.0, 1.5, 1.75]
    """
    gain, reached = [1.0], 1.0
    for rate in acceptance:
        reached *= rate
        gain.append(gain[-1] + reached)
    return gain


def best_size(
    emitted: Mapping[int, float], verify: Mapping[int, float], draft: Callable[[int], float] = lambda size: 0.0
) -> tuple[int, float]:
    """(n, speed-up over plain decoding) of the best number of verified tokens, the root included.

    `emitted[n]`: tokens a round with n verified tokens; n = 1 need not be given. `verify`: seconds of a pass over n
    tokens, at some sizes. `draft(n)`: seconds of drafting n - 1 tokens. Of equal sizes the smaller wins.

    >>> best_size({2: 1.7, 4: 2.2}, {1: 1.0, 2: 1.1, 4: 2.0})
    (2, 1.5454545454545452)
    """
    plain = seconds_at(verify, 1)
    speed = {1: 1.0}
    for size, tokens in sorted(emitted.items()):
        if size > 1:
            speed[size] = tokens * plain / (draft(size) + seconds_at(verify, size))
    best = max(sorted(speed), key=lambda size: speed[size])
    return best, speed[best]
