"""The sweep: finished runs are not repeated, failed ones are reported and the rest go on; it stops and resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from minicpm_ref.wind_tunnel import Task, run_tasks
from minicpm_ref.wind_tunnel.tasks import RECORD, execute, finished

QUIET = Console(quiet=True)
RUN = "wind_tunnel_runs:run"
UNIT = Path(__file__).parents[1]


def good(name: str, value: int = 1) -> Task:
    return Task(name, RUN, {"value": value})


def test_failures_are_reported_and_the_rest_go_on(tmp_path: Path) -> None:
    bad = [Task(how, RUN, {"how": how, "value": 0}) for how in ("raise", "exit", "kill")]
    tasks = [good("first"), *bad, good("last", 2)]
    outcomes = {outcome.name: outcome for outcome in run_tasks(tasks, tmp_path, workers=2, console=QUIET)}
    assert [outcome.status for outcome in outcomes.values()] == ["finished", "failed", "failed", "failed", "finished"]
    assert "Unsendable: planted error" in outcomes["raise"].message
    assert "exit code 3" in outcomes["exit"].message
    assert "signal 9" in outcomes["kill"].message
    for task in bad:
        assert str(tmp_path / task.name) in outcomes[task.name].message, "it says where the log is"
        assert "running" in (tmp_path / task.name / "log.txt").read_text()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("value.txt")}
    again = run_tasks(tasks[:1] + tasks[-1:], tmp_path, console=QUIET)
    assert [outcome.status for outcome in again] == ["kept", "kept"]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("value.txt")}


def test_a_half_written_run_is_not_finished(tmp_path: Path) -> None:
    task = good("one")
    execute(task, tmp_path, {"times": 3})
    assert finished(task, tmp_path) == {"value": 3, "files": ["value.txt"]}
    (tmp_path / "one" / "value.txt").write_text("cut")
    assert finished(task, tmp_path) is None, "a file that changed"
    (tmp_path / "one" / RECORD).unlink()
    assert finished(task, tmp_path) is None, "a log and files without a record"


def test_other_settings_are_named_and_refused(tmp_path: Path) -> None:
    execute(good("one", 1), tmp_path, {})
    with pytest.raises(ValueError, match=r"value = 2 \(was 1\)"):
        run_tasks([good("one", 2)], tmp_path, console=QUIET)
    with pytest.raises(ValueError, match="two tasks are called one"):
        run_tasks([good("one"), good("one")], tmp_path, console=QUIET)
    with pytest.raises(ValueError, match="task name"):
        good("../outside")


def test_records_do_not_depend_on_who_ran_the_task(tmp_path: Path) -> None:
    execute(good("one", 5), tmp_path / "here", {})
    run_tasks([good("one", 5)], tmp_path / "pool", console=QUIET)
    pool, here = ((tmp_path / place / "one" / RECORD).read_bytes() for place in ("pool", "here"))
    assert pool == here


def test_ray_leaves_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(UNIT), *sys.path]))  # what its workers import
    tasks = [good("one", 5), Task("raise", RUN, {"how": "raise", "value": 0}), Task("exit", RUN, {"how": "exit"})]
    outcomes = run_tasks(tasks, tmp_path / "ray", ray="local", console=QUIET)
    assert [outcome.status for outcome in outcomes] == ["finished", "failed", "failed"]
    assert "planted error" in outcomes[1].message
    execute(tasks[0], tmp_path / "here", {})
    ray, here = ((tmp_path / place / "one" / RECORD).read_bytes() for place in ("ray", "here"))
    assert ray == here


SWEEP = """
import sys
from minicpm_ref.wind_tunnel import Task, run_tasks
if __name__ == "__main__":
    try:
        for outcome in run_tasks([Task("slow", "wind_tunnel_runs:run", {"how": "wait"})], sys.argv[1]):
            print(outcome.status)
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_goes_on_where_it_was(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "sweep.py"
    script.write_text(SWEEP)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(UNIT), *sys.path])}
    command = [sys.executable, str(script), str(tmp_path / "runs")]
    # as a shell starts a job with `&`: SIGINT is ignored in it, which the runner must undo
    sweep = subprocess.Popen(
        ["bash", "-c", 'trap "" INT; exec "$@"', "bash", *command], env=environment, stdout=subprocess.PIPE, text=True
    )
    log = tmp_path / "runs" / "slow" / "log.txt"
    deadline = time.monotonic() + 120
    while not (log.is_file() and "running" in log.read_text()):
        assert time.monotonic() < deadline, "the run never began"
        assert sweep.poll() is None, "the sweep ended early"
        time.sleep(0.05)
    sweep.send_signal(number)
    out, _ = sweep.communicate(timeout=60)
    assert "slow: stopped" in out
    assert "interrupted" in out
    steps = int((tmp_path / "runs" / "slow" / "steps").read_text())
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "finished" in again.stdout
    record = json.loads((tmp_path / "runs" / "slow" / RECORD).read_text())
    assert record["result"] == {"begun_at": steps}


def test_a_second_live_sweep_is_refused(tmp_path: Path) -> None:
    import fcntl

    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another run is using this folder"):
            run_tasks([good("one")], tmp_path, console=QUIET)
