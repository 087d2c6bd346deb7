"""UltraClean: filter training data, and let training itself decide whether the filter helped.

In reading order: `documents` (reading), `normalise`, `filters` (rules), `dedup`, `decontaminate`, `classifier`;
`pipeline` puts them together over shards, with `records` (what is finished), `workers` and `cluster` (who does it) and
`report` (what it threw away); `verify` trains, and `loop` repeats. `planted` makes junk with known truth.
Sources: MiniCPM4 technical report (arXiv 2506.07900) section 2.2.1; Ultra-FineWeb (arXiv 2505.05427).
"""

from minicpm_ref.ultraclean.classifier import Classifier, ClassifierSettings, train_classifier
from minicpm_ref.ultraclean.decontaminate import Contamination
from minicpm_ref.ultraclean.dedup import candidate_probability, jaccard, shingles
from minicpm_ref.ultraclean.documents import Document, Unread, read_piece
from minicpm_ref.ultraclean.filters import RULES, apply_rules
from minicpm_ref.ultraclean.normalise import normalise
from minicpm_ref.ultraclean.pipeline import CleanSettings, clean

__all__ = [
    "RULES",
    "Classifier",
    "ClassifierSettings",
    "CleanSettings",
    "Contamination",
    "Document",
    "Unread",
    "apply_rules",
    "candidate_probability",
    "clean",
    "jaccard",
    "normalise",
    "read_piece",
    "shingles",
    "train_classifier",
]
