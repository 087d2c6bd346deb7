"""What a step knows: one record of sizes and addresses, filled in once, and the description of the tokens of a call.

The compiled step reads these fields by name (`s.layers`), so a model's sizes are arguments and not constants: one
compilation serves every model. Fields that end in `_at` are addresses, those in `_bytes` distances between the parts
of different threads.
"""

from __future__ import annotations

import numpy as np

SIZES = (
    "layers", "heads", "kv_heads",
    "head_dim", "head_dim_padded",  # D, and D up to sixteen
    "width",  # C
    "stride",  # floats from token to token of the residual stream: C up to the groups of the formats
    "qkv_rows", "width_rows", "vocab_rows",  # rows of the products, up to sixteen
    "ffn",  # up to the groups of `down`
    "group", "head_group",  # columns of a group in the layers' and the head's format
    "batch", "blocks",  # rows of the cache; its blocks of sixteen positions a row
    "element",  # bytes of a number in the cache
    "private",  # up to this many tokens every thread normalizes for itself: cheaper than a barrier
    "positions",  # of the table of angles
)  # fmt: skip
WEIGHTS = (
    "stream_at",  # the packed matrices
    "offsets_at",  # int64 [layers + 1][4]: q k v, o, gate and up, down of each layer; then head, embedding
    "norms_at",  # float32 [2 layers + 1][stride]
    "angles_at",  # float32 [2 (short, long)][positions][2 (cos, sin)][D / 2]
)
BUFFERS = (
    "keys_at", "values_at",  # [layers][batch][kv_heads][blocks] blocks
    "x_at",  # residual stream [T][stride]
    "captured_at",  # [captured layers][T][stride]
    "qkv_at",  # [T][qkv_rows]
    "queries_at",  # [kv_heads][T][heads of a group][head_dim_padded]
    "attended_at", "attended_stride",  # [T][heads * D, up to a group]
    "gate_up_at", "out_at",  # [T][2 ffn]; [T][width_rows]
    "states_at",  # of parts, [units][heads of a group][head_dim_padded + TAIL]
    "operand_at", "scales_at", "sums_at",  # one a thread, and at last a shared one
    "operand_bytes", "scales_bytes",
    "hidden_at", "hidden_scales_at", "hidden_sums_at",  # the operand of `down`
    "own_at", "own_bytes",  # scratch a thread
    "own_scores", "own_part", "own_total", "own_counts", "own_blocks", "own_gather",  # places in it
    "logits_at",  # [wanted][vocab_rows]
)  # fmt: skip
CODE = ("matmul_at", "write_at", "head_matmul_at", "head_write_at", "read_at", "attend_at", "place_at")
CALL = (
    "tokens", "wanted",  # how many
    "ids_at", "rows_at", "slots_at", "positions_at", "long_at",  # int64 [T] each; slot: place in the cache's row
    "parents_at",  # int64 [T]: of a tree, the index of its parent among the call's tokens, or -1
    "wanted_at",  # int64: the tokens whose logits are asked for
    "tiles_at", "tile_count", "head_tiles_at", "head_tile_count",  # int64 [.][2]: first token, tokens
    "units_at", "unit_count",  # int64 [.][6]: first token, tokens, kv head, first part, parts, past of a tree or -1
    "split",  # whether a unit is one part, joined later
)  # fmt: skip
CAPTURE = ("captured_layers_at",)  # int64 [layers + 1]: place among the captured, or -1
FLOATS = ("eps", "embedding_scale", "residual_scale", "head_scale", "query_scale")

STATE = np.dtype(
    [(name, np.int64) for name in (*SIZES, *WEIGHTS, *BUFFERS, *CODE, *CALL, *CAPTURE)]
    + [(name, np.float32) for name in FLOATS]
)
UNIT = 6  # numbers of a unit of attention
