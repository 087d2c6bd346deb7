"""Cases of the curve that says which near duplicates share a band.

It goes wrong where bands and rows are swapped, which hardly shows when they are alike; so the rows have few bands of
many rows, and many of few. Values 0 and 1 are exact ends, and a single band of one row is the similarity itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CandidateProbabilityCase:
    """One row: `candidate_probability(similarity, bands, rows)` on `values` Jaccard values from 0 to 1."""

    name: str
    bands: int
    rows: int
    values: int = 11

    def build(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, int, int]:
        """(similarity [values], bands, rows)."""
        return torch.linspace(0, 1, self.values, dtype=dtype, device=device), self.bands, self.rows


CANDIDATE_PROBABILITY = (
    CandidateProbabilityCase("one value", 3, 2, values=1),
    CandidateProbabilityCase("one band of one row", 1, 1),
    CandidateProbabilityCase("14 bands of 8", 14, 8),
    CandidateProbabilityCase("60 bands of 13", 60, 13, values=101),
    CandidateProbabilityCase("13 bands of 60", 13, 60, values=101),
    CandidateProbabilityCase("a prime number of values", 9, 13, values=37),
)
