"""Runs for the tests of the sweep's runner: quick ones, and each way in which one can fail."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minicpm_ref.wind_tunnel.tasks import Stopped, stop_requested


class Unsendable(Exception):
    """Its constructor takes other arguments than it passes on, so pickle cannot rebuild it."""

    def __init__(self, one: str, two: str):
        super().__init__(one + two)


def run(settings: Mapping[str, Any], folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Do what settings["how"] says; a run that ends well leaves a file with settings["value"]."""
    how = settings.get("how", "well")
    print(f"running {how}", flush=True)
    if how == "raise":
        raise Unsendable("planted ", "error")
    if how == "exit":
        os._exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "wait":  # counts its steps in a file, as a trainer saves its state
        steps = folder / "steps"
        begun = int(steps.read_text()) if steps.exists() else 0
        for step in range(begun, 40):
            time.sleep(0.05)
            if stop_requested() and not inputs.get("deaf"):
                steps.write_text(str(step))
                raise Stopped
        return {"begun_at": begun}
    (folder / "value.txt").write_text(str(settings["value"]))
    return {"value": settings["value"] * inputs.get("times", 1), "files": ["value.txt"]}
