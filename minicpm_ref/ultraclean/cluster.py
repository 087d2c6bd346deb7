"""The same shards on a Ray cluster: Ray Data carries the tasks, and what they write is what the local run writes.

The problem: a corpus that takes one machine a week.
The idea: the unit of work is already a shard that any process can do, that writes files named by the shard alone, and
that can be done twice without harm. So nothing of the cleaning is written a second time: Ray Data maps the very same
function over the numbers of the shards, with results joined by number, whatever the order in which they come.

Every machine must see the input and the output folder under the same paths. Needs the extra `distributed`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

from minicpm_ref.ultraclean.workers import Task, attempt, unwrap


def run_shards_on_ray(
    task: Task, numbers: Sequence[int], workers: int = 1, done: Callable[[int, Any], None] = lambda number, result: None
) -> None:
    """`workers.run_shards` on Ray: on the cluster this process is connected to, else on a local one that it starts.

    Raises ShardError with the words of the first shard that fails.
    """
    import ray
    import ray.data

    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def one(row: dict[str, Any]) -> dict[str, Any]:
        outcome = attempt(task, int(row["number"]))
        return {"number": int(row["number"]), "outcome": pickle.dumps(outcome)}

    items = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
    for row in items.map(one, concurrency=workers).iter_rows():
        done(int(row["number"]), unwrap(pickle.loads(row["outcome"])))
