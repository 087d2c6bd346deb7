"""Speculative decoding that is lossless: drafts are guesses, and `acceptance` decides which of them stay."""

from minicpm_ref.speculative.acceptance import (
    Acceptance,
    accept_multi_round,
    accept_onehot,
    accept_sampled_chain,
    acceptance_rate,
    draw,
    match_path,
)
from minicpm_ref.speculative.draft_head import DraftHead, DraftHeadConfig, load_head, save_head
from minicpm_ref.speculative.draft_tree import Guesses, HeadDrafter, grow
from minicpm_ref.speculative.drafter import Draft, Drafter
from minicpm_ref.speculative.loop import Speculation, Tally, Verifier, speculate
from minicpm_ref.speculative.model_drafter import ModelDrafter
from minicpm_ref.speculative.ngram import NGramDrafter
from minicpm_ref.speculative.tree_size import best_size, cached_verify, chain_gain, measure_verify, seconds_at
from minicpm_ref.speculative.vocabulary import Coverage, count_tokens, coverage, frequent_tokens, offsets, trim_head

__all__ = [
    "Acceptance",
    "Coverage",
    "Draft",
    "DraftHead",
    "DraftHeadConfig",
    "Drafter",
    "Guesses",
    "HeadDrafter",
    "ModelDrafter",
    "NGramDrafter",
    "Speculation",
    "Tally",
    "Verifier",
    "accept_multi_round",
    "accept_onehot",
    "accept_sampled_chain",
    "acceptance_rate",
    "best_size",
    "cached_verify",
    "chain_gain",
    "count_tokens",
    "coverage",
    "draw",
    "frequent_tokens",
    "grow",
    "load_head",
    "match_path",
    "measure_verify",
    "offsets",
    "save_head",
    "seconds_at",
    "speculate",
    "trim_head",
]
