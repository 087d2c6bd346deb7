"""Workers: an error or a death ends the run within seconds, with words, and leaves no process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from minicpm_ref.ultraclean.workers import ShardError, run_shards


class Unsendable(Exception):
    """Cannot be rebuilt from its own arguments, so pickling it succeeds and unpickling does not."""

    def __init__(self, one: str, two: str):
        super().__init__(one)


def misbehave(number: int) -> int:
    how = os.environ["HOW"] if number == 5 else "well"
    if how == "raise":
        raise Unsendable("document 5", "is broken")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "slow":
        time.sleep(60)
    if os.environ["HOW"] == "order":
        time.sleep(0.2 / (1 + number))  # the first comes last
    return number * number


# a shell that starts a command in the background lets it ignore Ctrl-C, and so would everything below it
SCRIPT = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_workers import misbehave
from minicpm_ref.ultraclean.workers import run_shards
if __name__ == "__main__":
    run_shards(misbehave, range(10), 2, lambda number, result: print(number, result, flush=True))
"""


def test_results_carry_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOW", "order")
    found: dict[int, Any] = {}
    run_shards(misbehave, range(6), 1, found.__setitem__)
    assert found == {n: n * n for n in range(6)}


def test_an_error_in_this_process_has_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOW", "raise")
    with pytest.raises(ShardError, match="shard 5: Unsendable: document 5"):
        run_shards(misbehave, range(10), 1)
    with pytest.raises(ValueError, match="workers = 0"):
        run_shards(misbehave, range(10), 0)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise", "Unsendable: document 5"),
        ("kill", "a worker died"),
        ("slow", "KeyboardInterrupt"),
    ],
)
def test_a_broken_worker_ends_the_run(how: str, words: str, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script], env=os.environ | {"HOW": how}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if how == "slow":
        assert process.stdout is not None
        process.stdout.readline()  # the workers are at work
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to parent and workers
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert words in stderr
    assert group_ends(process.pid), "a process of the run remains"


def group_ends(group: int, seconds: float = 10) -> bool:
    """True as soon as no process of the group is left."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False
