"""The embedded base model: five million parameters, trained on Python source for about an hour of two CPU cores.

Shape and rates come from the wind-tunnel sweep in figures/data/sweep.json. At width 256 the shapes learn alike, and 4
layers with 4 query heads on 1 key-value head are the fastest; width 512 with 2 layers learns more from each token, but
runs a quarter slower and leaves little depth to look into. The sweep's short runs are nearly flat from a learning rate
of 0.01 to 0.02; this run is some thirty times longer, so it takes the lower one. Every matrix has an input width that
is a multiple of 256, which ternary groups of 128 and 256 need.

A run of this length reads well over half of the corpus once, so the corpus is kept to what it can learn from: build
it with `minicpm-ref data --groups stdlib,numpy,networkx`.
"""

from minicpm_ref.config import ModelConfig
from minicpm_ref.train import Recipe

CONFIG = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=1,
    intermediate_size=768,
    max_position_embeddings=4096,
    eos_token_id=(2,),
)

RECIPE = Recipe(name="base", config=CONFIG, tokens=7_700_000, context=512, lr=0.01, matrix_lr=0.02)
