"""The results of a study on disk: kept after every part, refused when they belong to other settings."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from minicpm_ref.data import Corpus
from minicpm_ref.files import write_text
from minicpm_ref.machine import machine
from minicpm_ref.plotting import FIGURES


class Record:
    """Results of one study, figures/data/<name>.json: read when it exists, written after every part.

    A file that was measured with other settings or on another corpus is refused with ValueError.
    """

    def __init__(self, name: str, corpus: Corpus, settings: dict[str, Any], folder: Path | None = None):
        self.path = (folder or FIGURES / "data") / f"{name}.json"
        settings = json.loads(json.dumps(settings | {"corpus_manifest_sha256": corpus.manifest_sha256}))
        self.results: dict[str, Any] = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}
        if self.results and self.results["settings"] != settings:
            raise ValueError(f"{self.path}: measured with other settings; move it away to measure anew")
        where = machine(torch.device("cpu"))
        self.results |= {
            "device": where["device"],
            "versions": {key: where[key] for key in ("torch", "python")},
            "settings": settings,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }

    def part(self, name: str) -> dict[str, Any]:
        """The section `name`, empty at first; change it and call `save`."""
        return self.results.setdefault(name, {})

    def save(self) -> None:
        """Write the file, atomically."""
        write_text(self.path, json.dumps(self.results, indent=1) + "\n")
