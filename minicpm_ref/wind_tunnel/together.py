"""One process of a task that several share: `torchrun ... -m minicpm_ref.wind_tunnel.together JOB`, JOB being JSON.

The trainer reads RANK and WORLD_SIZE, which torchrun sets, and shares each batch; the first process writes the record.
"""

from __future__ import annotations

import json
import sys

from minicpm_ref.wind_tunnel.tasks import Task, execute

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    execute(Task(**job["task"]), job["folder"], job["inputs"])
