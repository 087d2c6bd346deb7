"""The runs of a sweep on Ray: the same tasks, the same files, on as many machines as the cluster has.

The runner's `attempt` is what runs on the other side, so a run cannot tell who started it. The folder of the sweep must
be one that every machine sees. Ray needs the extra `distributed`; nothing else imports this file.

Ctrl-C cancels what runs; each run goes on later from the state that it saves every minute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minicpm_ref.wind_tunnel.runner import Outcome, attempt
from minicpm_ref.wind_tunnel.tasks import LOG, Task


def run_ray(
    tasks: Sequence[Task],
    folder: Path,
    inputs: Mapping[str, Any],
    address: str,
    threads: int,
    report: Callable[[Outcome], None],
) -> None:
    """Run `tasks` on the cluster at `address`: "auto" finds a running one, "local" starts one on this machine.

    Every run asks for `threads` cores; Ray decides how many run at a time. A task is never tried twice: a run that
    fails is reported like any other.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise RuntimeError("ray is not installed: pip install 'minicpm_ref[distributed]', or leave --ray out") from None

    ours = not ray.is_initialized()
    if ours:
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    try:
        remote = ray.remote(attempt)
        waiting = {
            remote.options(num_cpus=threads * task.processes, max_retries=0, name=task.name).remote(
                task, folder.absolute(), inputs, threads
            ): task
            for task in tasks
        }
        try:
            while waiting:
                for done in ray.wait(list(waiting), num_returns=1)[0]:
                    task = waiting.pop(done)
                    try:
                        outcome: Outcome = ray.get(done)
                    except ray.exceptions.RayError as error:  # the worker died; its log says how far it came
                        words = (
                            f"{type(error).__name__}: {str(error).splitlines()[0]}; see {LOG} in {folder / task.name}"
                        )
                        outcome = Outcome(task.name, "failed", words)
                    report(outcome)
        except KeyboardInterrupt:
            for reference in waiting:
                ray.cancel(reference)
            raise
    finally:
        if ours:
            ray.shutdown()
