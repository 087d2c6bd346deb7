"""The embedded base model: five million parameters, trained on Python source for an hour and a half of two CPU
cores.

Shape and rates come from the wind-tunnel sweep in figures/data/sweep.json. At width 256 the shapes learn alike, and 4
layers with 4 query heads on 1 key-value head are the fastest; width 512 with 2 layers learns more from each token, but
runs a quarter slower and leaves little depth to look into. The sweep's short runs are nearly flat from a learning rate
of 0.01 to 0.02; this run is some thirty times longer, so it takes the lower one. Every matrix has an input width that
is a multiple of 256, which ternary groups of 128 and 256 need.

The run reads its corpus six times: build it with `minicpm-ref data --groups stdlib,numpy,networkx`, which is what so
small a model can learn from. Its stable phase is embedded beside it (`weights/stable`): the state after 32.4 million
tokens, from which other runs branch off: a shorter decay (`--tokens 50000000`), or the ternary variant.
"""

from minicpm_ref.config import ModelConfig
from minicpm_ref.training.recipe import Recipe

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

RECIPE = Recipe(name="base", config=CONFIG, tokens=80_000_000, context=512, batch_tokens=8192, warmup_tokens=1_000_000)
