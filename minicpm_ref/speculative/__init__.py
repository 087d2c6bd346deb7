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

__all__ = [
    "Acceptance",
    "accept_multi_round",
    "accept_onehot",
    "accept_sampled_chain",
    "acceptance_rate",
    "draw",
    "match_path",
]
