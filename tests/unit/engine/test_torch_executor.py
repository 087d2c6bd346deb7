"""The torch executor against the reference decoder: every way to put tokens into a row gives the same logits.

Differences are judged against the largest logit: float32 sums made in another order (a chunk, a batch, folded heads).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fresh import fresh_model

from minicpm_ref.checkpoint import load
from minicpm_ref.config import LongRope, ModelConfig, SparseConfig, next_border
from minicpm_ref.engine.executor import depths
from minicpm_ref.engine.torch_executor import TorchExecutor
from minicpm_ref.model import MiniCPM

ROPE = LongRope((1.0, 1.0, 1.1, 1.3), (1.0, 1.7, 2.5, 4.0), original_max_position_embeddings=32)
SPARSE = SparseConfig(kernel_size=4, kernel_stride=2, init_blocks=1, block_size=4, window_size=8, topk=2, dense_len=24)
SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128}
CONFIGS = {
    "dense": ModelConfig(**SIZES),
    "sparse": ModelConfig(**SIZES, sparse_config=SPARSE),
    "long-rope": ModelConfig(**SIZES, rope_scaling=ROPE),
}
IDS = torch.randint(0, 61, (100,), generator=torch.Generator().manual_seed(7)).tolist()


def model_of(name: str) -> MiniCPM:
    return fresh_model(CONFIGS[name], seed=3)


@pytest.fixture(params=CONFIGS)
def model(request) -> MiniCPM:
    return model_of(request.param)


@torch.no_grad()
def reference(model: MiniCPM, ids: list[int]) -> np.ndarray:
    """Logits [V] after one pass over ids, in float64."""
    double = MiniCPM(model.config).double()
    double.load_state_dict(model.state_dict())
    return double(torch.tensor([ids]))[0, -1].float().numpy()


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    # some tens of float32 sums of some tens of numbers in another order: 1e-5 of the largest is 100 roundings
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def poison(executor: TorchExecutor) -> None:
    """NaN wherever no row holds a token: who reads it shows it."""
    for row in range(executor.batch):
        for store in (executor.cache.keys, executor.cache.values):
            store[:, row, :, executor.length(row) :] = torch.nan


@pytest.mark.parametrize("length", [1, 23, 24, 33, 70])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_a_prompt_in_chunks_equals_one_pass(model: MiniCPM, length: int, chunk: int) -> None:
    executor = TorchExecutor(model, batch=2, max_length=100, chunk_length=chunk)
    poison(executor)
    assert_same(executor.prefill(1, IDS[:length]), reference(model, IDS[:length]))
    assert [executor.length(row) for row in (0, 1)] == [0, length]


def test_a_prompt_in_several_calls_knows_its_final_length(model: MiniCPM) -> None:
    executor = TorchExecutor(model, max_length=100)
    for start in range(0, 60, 9):
        logits = executor.prefill(0, IDS[start : min(start + 9, 60)], final_length=60)
    assert_same(logits, reference(model, IDS[:60]))


def decoded(model: MiniCPM, prompt: int, length: int) -> np.ndarray:
    """Logits [length - prompt, V] of a lone row that decodes IDS[prompt:length] after a prefill."""
    executor = TorchExecutor(model, max_length=100)
    executor.prefill(0, IDS[:prompt])
    return np.stack([executor.decode([0], [token])[0] for token in IDS[prompt:length]])


@torch.no_grad()
def test_decoding_equals_the_reference_decoder_across_both_borders(model: MiniCPM) -> None:
    from minicpm_ref.cache import KVCache

    cache, found = KVCache(model.config, 1, 100), []
    model(torch.tensor([IDS[:20]]), cache)
    for token in IDS[20:50]:
        found.append(model(torch.tensor([[token]]), cache)[0, -1].numpy())
    assert_same(decoded(model, 20, 50), np.stack(found))


def test_rows_do_not_see_each_other(model: MiniCPM) -> None:
    executor = TorchExecutor(model, batch=3, max_length=100)
    poison(executor)
    prompts = [8, 60, 30]  # short and long angles, dense and sparse, side by side
    for row, prompt in enumerate(prompts):
        executor.prefill(row, IDS[:prompt])
    for step in range(6):
        rows = [2, 0, 1] if step % 2 else [1, 2]  # one of them pauses now and then
        tokens = [IDS[executor.length(row)] for row in rows]
        logits = executor.decode(rows, tokens)
        for row, found in zip(rows, logits, strict=True):
            assert_same(found, decoded(model, prompts[row], executor.length(row))[-1])


def test_verifying_a_chain_equals_decoding(model: MiniCPM) -> None:
    executor = TorchExecutor(model, max_length=100)
    for base in (10, 40):
        executor.truncate(0, 0)
        executor.prefill(0, IDS[:base])
        assert next_border(model.config, base) is None or next_border(model.config, base) >= base + 5
        assert_same(executor.verify(0, IDS[base : base + 5]), decoded(model, base, base + 5))
        executor.truncate(0, base + 2)
        poison(executor)
        assert_same(executor.decode([0], [IDS[base + 2]])[0], decoded(model, base, base + 3)[-1])


PARENTS = [-1, -1, 0, 0, 1, 3, -1, 5]


@pytest.mark.parametrize("base", [1, 10, 40])
def test_each_node_of_a_tree_equals_decoding_its_branch(model: MiniCPM, base: int) -> None:
    executor = TorchExecutor(model, max_length=100)
    executor.prefill(0, IDS[:base])
    poison(executor)
    tokens = IDS[60 : 60 + len(PARENTS)]
    found = executor.verify(0, tokens, PARENTS)
    alone = TorchExecutor(model, max_length=100)
    for node in range(len(tokens)):
        branch = [node]
        while PARENTS[branch[0]] >= 0:
            branch.insert(0, PARENTS[branch[0]])
        alone.truncate(0, 0)
        alone.prefill(0, IDS[:base])
        logits = [alone.decode([0], [tokens[index]])[0] for index in branch]
        assert_same(found[node], logits[-1])
    path = [0, 3, 5, 7]
    executor.keep(0, base, path)
    poison(executor)
    alone.truncate(0, base)
    alone.verify(0, [tokens[index] for index in path])
    assert executor.length(0) == base + len(path)
    assert_same(executor.decode([0], [IDS[9]]), alone.decode([0], [IDS[9]]))


def test_turned_keys_turn_back() -> None:
    """A row that crossed LongRoPE's original length and was cut again equals one that never did (code review C5)."""
    model = model_of("long-rope")
    executor = TorchExecutor(model, max_length=100)
    executor.prefill(0, IDS[:30])
    for token in IDS[30:36]:
        executor.decode([0], [token])
    executor.truncate(0, 30)
    assert_same(executor.decode([0], [IDS[30]])[0], decoded(model, 30, 31)[-1])
    # planted: keys that stay turned
    executor.decode([0], [IDS[31]])
    executor.decode([0], [IDS[32]])
    executor.truncate(0, 30)
    executor.cache.long[0] = False
    with pytest.raises(AssertionError):
        assert_same(executor.decode([0], [IDS[30]])[0], decoded(model, 30, 31)[-1])


def test_planted_faults_are_caught(monkeypatch) -> None:
    """A stale row of the cache and an offset of one in the angles change the logits by more than the bound."""
    model = model_of("dense")
    expected = reference(model, IDS[:20])
    for fault in ("stale", "offset"):
        executor = TorchExecutor(model, max_length=100)
        executor.prefill(0, IDS[40:48])
        if fault == "offset":
            executor._angles = executor._angles.roll(1, dims=2)
            executor.truncate(0, 0)
            executor.prefill(0, IDS[:1])  # its key stands at angle 0 of the right table in a correct executor
            executor._angles = executor._angles.roll(-1, dims=2)
            logits = executor.prefill(0, IDS[1:20])
        else:
            executor.truncate(0, 8)
            logits = executor.prefill(0, IDS[8:20])  # the first 8 keys are those of another prompt
        with pytest.raises(AssertionError):
            assert_same(logits, expected)


def test_hidden_states_are_those_of_the_model(model: MiniCPM) -> None:
    executor = TorchExecutor(model, max_length=100, chunk_length=7, capture_layers=(0, 2, 1))
    executor.prefill(0, IDS[:20])
    with torch.no_grad():
        states = model.hidden_states(torch.tensor([IDS[:20]]))
    assert_same(executor.hidden(0, [2, 0]), torch.cat((states[2], states[0])).numpy())
    executor.decode([0], [3])
    assert executor.hidden(0, [1]).shape == (1, 1, 32)
    with pytest.raises(RuntimeError, match="capture_layers"):
        TorchExecutor(model, max_length=8).hidden(0, [1])


@pytest.mark.parametrize("variant", ["base", "sparse", "ternary"])
def test_embedded_weights_choose_the_same_tokens(variant: str) -> None:
    model, tokenizer = load(variant=variant)
    assert tokenizer is not None
    ids = tokenizer.encode("import os\nimport sys\n\n\nclass Reader:\n    def __init__(self, path):\n")
    executor = TorchExecutor(model, max_length=64)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0, -1].numpy()
    # the ternary kernel rounds activations to int8: a rounding that falls the other way is worth 1/127 of one of them
    atol = (2e-2 if variant == "ternary" else 1e-5) * np.abs(expected).max()
    np.testing.assert_allclose(executor.prefill(0, ids), expected, rtol=0, atol=atol)


def test_mistakes_are_refused_before_anything_changes() -> None:
    executor = TorchExecutor(model_of("dense"), batch=2, max_length=10)
    executor.prefill(0, IDS[:8])
    refused = [
        (lambda: executor.prefill(2, [1]), "row = 2"),
        (lambda: executor.prefill(0, []), "empty"),
        (lambda: executor.prefill(0, [1, -1]), "token id -1"),
        (lambda: executor.decode([0], [61]), "token id 61"),
        (lambda: executor.prefill(0, [1, 2, 3]), "exceed max_length = 10"),
        (lambda: executor.prefill(1, [1, 2], final_length=1), "final_length = 1"),
        (lambda: executor.decode([0, 0], [1, 1]), "distinct rows"),
        (lambda: executor.verify(0, [1, 2], [0, -1]), r"parents\[0\] = 0"),
        (lambda: executor.verify(0, [1, 2], [-1]), "1 parents for 2"),
        (lambda: executor.truncate(0, 9), "it holds 8"),
        (lambda: executor.keep(0, 6, [1, 0]), "ascending"),
        (lambda: executor.keep(0, 6, [2]), "into the 2 tokens"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()
    assert [executor.length(row) for row in (0, 1)] == [8, 0]
    with pytest.raises(ValueError, match="chunk_length"):
        TorchExecutor(model_of("dense"), chunk_length=0)


def test_memory_counts_every_byte_of_the_static_allocation() -> None:
    executor = TorchExecutor(model_of("sparse"), batch=2, max_length=40)
    memory = executor.memory()
    assert memory["weights"] == 4 * executor.config.num_parameters()
    assert executor.cache.compressed is not None
    assert memory["cache"] == executor.cache.nbytes + executor.cache.compressed.nbytes
    assert memory["scratch"] > 0


def test_depths() -> None:
    assert depths(PARENTS) == [0, 0, 1, 1, 1, 2, 0, 3]
    assert next_border(CONFIGS["sparse"], 22) == 23
    assert next_border(CONFIGS["sparse"], 23) is None
    assert next_border(CONFIGS["long-rope"], 5) == 32
