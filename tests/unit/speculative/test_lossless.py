"""Real networks: speculative text equals plain text, and the caches hold what they should.

Random small models in float64, where sums in another order do not move an argmax; then the embedded weights.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fresh import fresh_model

from minicpm_ref.checkpoint import load
from minicpm_ref.config import LongRope, ModelConfig, SparseConfig
from minicpm_ref.engine.torch_executor import TorchExecutor
from minicpm_ref.model import MiniCPM
from minicpm_ref.sampling import SamplingParams, generate
from minicpm_ref.speculative import (
    DraftHead,
    DraftHeadConfig,
    HeadDrafter,
    ModelDrafter,
    NGramDrafter,
    Tally,
    frequent_tokens,
    speculate,
    trim_head,
)

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 160}
SPARSE = SparseConfig(kernel_size=4, kernel_stride=2, block_size=4, window_size=8, topk=2, dense_len=24)
CONFIGS = {
    "dense": ModelConfig(**SIZES),
    "sparse": ModelConfig(**SIZES, sparse_config=SPARSE),
    "long-rope": ModelConfig(**SIZES, rope_scaling=LongRope((1.0,) * 4, (1.0, 1.5, 2.0, 3.0), 32)),
}
LAYERS = (0, 1, 2)
TREES = [(1, 1, 1), (1, 3, 3), (1, 7, 7), (1, 3, 4), (4, 3, 15), (10, 4, 39)]  # width, depth, drafts


def target_of(name: str) -> MiniCPM:
    return fresh_model(CONFIGS[name], seed=3).double()


def head_of(target: MiniCPM, size: int) -> DraftHead:
    """An adversarial head: random weights."""
    torch.manual_seed(0)
    head = DraftHead(
        DraftHeadConfig.for_target(target.config, layers=LAYERS), target.model.embed_tokens.weight
    ).double()
    return trim_head(head, frequent_tokens(torch.ones(40, dtype=torch.int64), size))


def plain(target: MiniCPM, prompt: list[int], length: int, params: SamplingParams | None = None) -> list[int]:
    return list(generate(target, torch.tensor([prompt]), length, params))


def prompt_of(length: int) -> list[int]:
    return torch.randint(0, 40, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_is_equal_in_every_shape(name: str) -> None:
    """D2: chains and trees, the whole draft vocabulary, a quarter of it and two tokens, across both borders."""
    target = target_of(name)
    executor = TorchExecutor(target, max_length=160, capture_layers=LAYERS)
    for index, (width, depth, nodes) in enumerate(TREES):
        prompt = prompt_of(5 + 7 * (index % 3))
        head = head_of(target, (40, 10, 2)[index % 3])
        found = list(speculate(executor, HeadDrafter(head, width, depth, nodes), prompt, 20))
        assert found == plain(target, prompt, 20), (width, depth, nodes)


@pytest.mark.parametrize("params", [SamplingParams(1.0, seed=1), SamplingParams(0.7, top_p=0.9, seed=2)], ids=str)
def test_sampled_text_is_equal_for_a_seed(params: SamplingParams) -> None:
    target = target_of("dense")
    executor = TorchExecutor(target, max_length=160, capture_layers=LAYERS)
    for drafter in (HeadDrafter(head_of(target, 40), 4, 3, 15), NGramDrafter(smallest=1, always=True)):
        assert list(speculate(executor, drafter, prompt_of(9), 40, params)) == plain(target, prompt_of(9), 40, params)


def test_caches_after_each_round_are_those_of_a_fresh_prefill() -> None:
    """D3 and D4: keys and values of the target, streams and memory of the head, after rounds that accept some."""
    target = target_of("dense")
    prompt = prompt_of(12)
    text = plain(target, prompt, 40)
    executor = TorchExecutor(target, max_length=160, capture_layers=LAYERS)
    head = head_of(target, 40)
    drafter = HeadDrafter(head, 4, 3, 15)
    tally = Tally()
    for count, _ in enumerate(speculate(executor, drafter, prompt, 40, tally=tally), 1):
        if count % 13:
            continue
        length = executor.length(0)
        ids = [*prompt, *text][:length]
        fresh = TorchExecutor(target, max_length=160, capture_layers=LAYERS)
        fresh.prefill(0, ids)
        for mine, other in ((executor.cache.keys, fresh.cache.keys), (executor.cache.values, fresh.cache.values)):
            np.testing.assert_allclose(mine[:, 0, :, :length], other[:, 0, :, :length], rtol=0, atol=1e-9)
        again = HeadDrafter(head, 4, 3, 15)
        streams = np.moveaxis(fresh.hidden(0, LAYERS), 0, 1).reshape(length, -1)
        again.start(ids[0])
        rows = drafter.rows
        again.extend(ids[1 : rows + 1], streams[:rows])
        assert again.memory is not None
        assert drafter.memory is not None
        assert drafter.memory.keys.shape[2] == rows  # no row of a draft is left
        assert torch.allclose(drafter.memory.keys, again.memory.keys, atol=1e-5)  # features pass through float32
        assert torch.allclose(drafter.memory.values, again.memory.values, atol=1e-5)


def test_streams_of_a_tree_are_those_of_its_paths() -> None:
    """D1: the three streams of every node equal a plain pass over prefix and path (the logits: see the executor)."""
    target = target_of("dense")
    executor = TorchExecutor(target, max_length=160, capture_layers=LAYERS)
    prompt, tokens, parents = prompt_of(12), [1, 2, 3, 4, 5, 6], [-1, 0, 0, 1, 2, 4]
    executor.prefill(0, prompt)
    executor.verify(0, tokens, parents)
    streams = executor.hidden(0, LAYERS)
    for node in range(6):
        path, at = [], node
        while at >= 0:
            path.insert(0, tokens[at])
            at = parents[at]
        with torch.no_grad():
            states = target.hidden_states(torch.tensor([[*prompt, *path]]))
        for found, layer in zip(streams[:, node], LAYERS, strict=True):
            np.testing.assert_allclose(found, states[layer][0, -1].float().numpy(), rtol=1e-5, atol=1e-5)


def test_a_model_that_drafts_for_itself_is_never_wrong() -> None:
    target = target_of("dense")
    tally = Tally()
    executor, copy = (TorchExecutor(target, max_length=160) for _ in range(2))
    found = list(speculate(executor, ModelDrafter(copy, 3), prompt_of(9), 41, tally=tally))
    assert found == plain(target, prompt_of(9), 41)
    assert (tally.rounds, tally.acceptance_length) == (10, 4.0)


PROMPT = "import os\nimport sys\n\n\nclass Reader:\n    def __init__(self, path):\n        self.path = path\n"


@pytest.mark.parametrize("variant", ["base", "sparse", "ternary"])
def test_embedded_weights_write_the_same_text(variant: str) -> None:
    """Greedy, float32: prompt lookup, a tree of an untrained head, and the ternary variant as the drafter.

    Sums depend on the number of tokens in a pass, so two logits that are equal up to rounding could swap; texts are
    compared up to the first place where the best two are that close.
    """
    model, tokenizer = load(variant=variant)
    assert tokenizer is not None
    prompt = tokenizer.encode(PROMPT)
    if variant == "sparse":  # dense_len is 512: begin just before the border and cross it
        prompt = (prompt * 40)[:500]
    expected, margins = [], []
    executor = TorchExecutor(model, max_length=600, capture_layers=(1, 2, 4))
    logits = executor.prefill(0, prompt)
    while len(expected) < 16:
        best = np.sort(logits)[-2:]
        margins.append(best[1] - best[0])
        expected.append(int(logits.argmax()))
        logits = executor.decode([0], [expected[-1]])[0]
    # the ternary kernel rounds activations to int8, so another order of sums can move a logit by a rounding step
    bound = 1e-2 if variant == "ternary" else 1e-3
    certain = next((place for place, margin in enumerate(margins) if margin <= bound), len(margins))
    assert certain >= 4
    torch.manual_seed(0)
    head = DraftHead(
        DraftHeadConfig.for_target(model.config, layers=(1, 2, 4)), model.model.embed_tokens.weight
    ).requires_grad_(False)
    drafters = {"ngram": NGramDrafter(smallest=1, always=True), "tree": HeadDrafter(head, 3, 3, 8)}
    if variant == "base":
        copy, _ = load(variant="ternary")
        drafters["self"] = ModelDrafter(TorchExecutor(copy, max_length=600), 3)  # type: ignore[assignment]
    for name, drafter in drafters.items():
        assert list(speculate(executor, drafter, prompt, 16))[:certain] == expected[:certain], name
