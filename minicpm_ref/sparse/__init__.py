"""InfLLM-V2 block-sparse attention: choose few blocks of keys, attend to those alone.

Problem. In dense attention every token reads all the keys before it, so a prompt of n tokens costs n^2. Most of that
reading is wasted: a token needs its neighbourhood, the start of the text, and a few far places. Which far places,
only the data knows.

Idea, in two stages, one file each: `blocks` chooses, `attention` attends. There are no extra parameters and no gradient
through the choice: keys learn through stage 2 alone, so the same weights run dense or sparse. `compressed_cache` keeps
what stage 1 scores beside a growing key cache; `tree` attends for a tree of drafts.

Sources: paper "InfLLM-V2" (arXiv 2509.24663) and the code that trained MiniCPM4.1, OpenBMB/infllmv2_cuda_impl. Where
they differ these files follow the code, which is what the published weights have seen.
"""

from minicpm_ref.sparse.attention import attend, sparse_attention
from minicpm_ref.sparse.blocks import (
    COARSE_FACTOR,
    CompressedKeys,
    block_scores,
    compress,
    compress_keys,
    pick_blocks,
    query_positions,
    select_blocks,
    window_count,
)
from minicpm_ref.sparse.compressed_cache import CompressedKeyCache
from minicpm_ref.sparse.tree import MOST_DRAFTS, sparse_tree_attention

__all__ = [
    "COARSE_FACTOR",
    "MOST_DRAFTS",
    "CompressedKeyCache",
    "CompressedKeys",
    "attend",
    "block_scores",
    "compress",
    "compress_keys",
    "pick_blocks",
    "query_positions",
    "select_blocks",
    "sparse_attention",
    "sparse_tree_attention",
    "window_count",
]
