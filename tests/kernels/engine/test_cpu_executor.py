"""The compiled executor against the reference decoder, in float32, and against itself, in bits.

Logits are judged against a float64 pass: the executor may be off by a few times what the float32 reference is off.
Between the ways to put tokens into a row there is no tolerance at all: a token's bits depend neither on chunks nor on
company, nor on whether it was decoded or verified, nor on the number of threads.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import threading
import time

import numpy as np
import pytest
import torch
from fresh import fresh_model

from minicpm_kernels.engine.threads import ARRIVED
from minicpm_ref.checkpoint import load
from minicpm_ref.config import LongRope, ModelConfig, SparseConfig
from minicpm_ref.engine.cpu_executor import CPUExecutor
from minicpm_ref.model import MiniCPM
from minicpm_ref.sampling import generate

ROPE = LongRope((1.0, 1.0, 1.1, 1.3), (1.0, 1.7, 2.5, 4.0), original_max_position_embeddings=32)
SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 512}
CONFIGS = {
    "plain": ModelConfig(**SIZES),
    "long-rope": ModelConfig(**SIZES, rope_scaling=ROPE),
    # widths that are no multiple of sixteen, one kv head for five, a tied head
    "odd": ModelConfig(
        vocab_size=61,
        hidden_size=50,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        intermediate_size=41,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    ),  # fmt: skip
}
IDS = torch.randint(0, 61, (400,), generator=torch.Generator().manual_seed(7)).tolist()
PARENTS = [-1, -1, 0, 0, 1, 3, -1, 5]


def model_of(name: str) -> MiniCPM:
    return fresh_model(CONFIGS[name], seed=3)


def executor_of(name: str, **settings) -> CPUExecutor:
    settings = {"max_length": 400, "cache": "float32", "threads": 1} | settings
    return CPUExecutor(model_of(name), **settings)


@torch.no_grad()
def assert_close(found: np.ndarray, model: MiniCPM, ids: list[int]) -> None:
    """Logits [V] after ids: at most four times as far from a float64 pass as a float32 pass, which itself is off by an
    accidental amount, so eight roundings of the largest logit are granted on top."""
    double = MiniCPM(model.config).double()
    double.load_state_dict(model.state_dict())
    exact = double(torch.tensor([ids]))[0, -1].numpy()
    single = model(torch.tensor([ids]))[0, -1].numpy()
    allowed = 4 * np.abs(single - exact).max() + 8 * 2**-24 * np.abs(exact).max()
    np.testing.assert_allclose(found, exact, rtol=0, atol=allowed)


def poison(executor: CPUExecutor) -> None:
    """NaN wherever no row holds a token: who reads it shows it."""
    keys, values = executor._decoder.keys, executor._decoder.values
    for row in range(executor.batch):
        block, place = divmod(executor.length(row), 16)
        if block < keys.shape[3]:
            keys[:, row, :, block, :, place:] = values[:, row, :, block, place:] = np.nan
            keys[:, row, :, block + 1 :] = values[:, row, :, block + 1 :] = np.nan


def decoded(executor: CPUExecutor, prompt: list[int], rest: list[int], row: int = 0) -> np.ndarray:
    """Logits [len(rest), V] of tokens decoded one by one after a prompt."""
    executor.truncate(row, 0)
    if prompt:
        executor.prefill(row, prompt)
    return np.stack([executor.decode([row], [token])[0] for token in rest])


@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_of_all_lengths_agree_with_the_reference(name: str) -> None:
    model, executor = model_of(name), executor_of(name)
    for length in (1, 2, 3, 15, 16, 17, 32, 33, 63, 64, 65, 127, 128, 129, 257):
        executor.truncate(0, 0)
        poison(executor)
        assert_close(executor.prefill(0, IDS[:length]), model, IDS[:length])


@pytest.mark.parametrize("name", CONFIGS)
def test_no_bit_depends_on_how_tokens_arrive(name: str) -> None:
    """One by one, in chunks, as a draft, beside other rows, on three threads: the same bits."""
    executor = executor_of(name, batch=3, chunk_length=11)
    for base in (5, 33, 140, 290):
        expected = decoded(executor, IDS[:base], IDS[base : base + 9], row=1)
        executor.truncate(1, base)
        poison(executor)
        np.testing.assert_array_equal(executor.verify(1, IDS[base : base + 9]), expected)
        executor.truncate(1, base)
        for row, length in ((0, 40), (2, 150)):
            executor.truncate(row, 0)
            executor.prefill(row, IDS[:length])
        together = [executor.decode([2, 1, 0], [4, IDS[base + i], 7])[1] for i in range(9)]
        np.testing.assert_array_equal(together, expected)
        for settings in ({"chunk_length": 64}, {"chunk_length": 5, "threads": 3}):
            other = executor_of(name, **settings)
            other.prefill(0, IDS[:base], final_length=base + 9 if CONFIGS[name].rope_scaling else None)
            if CONFIGS[name].rope_scaling is None or base > 32:
                np.testing.assert_array_equal(other.verify(0, IDS[base : base + 9]), expected)
            other.close()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("base", [1, 14, 40, 130])
def test_each_node_of_a_tree_equals_decoding_its_branch(name: str, base: int) -> None:
    executor = executor_of(name, batch=2, max_length=200)
    executor.prefill(0, IDS[:base])
    poison(executor)
    tokens = IDS[60 : 60 + len(PARENTS)]
    found = executor.verify(0, tokens, PARENTS)
    for node in range(len(tokens)):
        branch = [node]
        while PARENTS[branch[0]] >= 0:
            branch.insert(0, PARENTS[branch[0]])
        executor.truncate(1, 0)
        np.testing.assert_array_equal(
            found[node], decoded(executor, IDS[:base], [tokens[index] for index in branch], row=1)[-1]
        )
    path = [0, 3, 5, 7]
    executor.keep(0, base, path)
    poison(executor)
    assert executor.length(0) == base + len(path)
    expected = decoded(executor, IDS[:base], [*(tokens[index] for index in path), IDS[9]], row=1)[-1]
    np.testing.assert_array_equal(executor.decode([0], [IDS[9]])[0], expected)


def test_keys_turn_forth_and_back_at_the_border_of_the_angles() -> None:
    from minicpm_ref.engine.torch_executor import TorchExecutor

    model, executor = model_of("long-rope"), executor_of("long-rope")
    oracle = TorchExecutor(model, max_length=400)
    for run in (executor, oracle):
        run.prefill(0, IDS[:30])
    for token in IDS[30:36]:
        found, expected = (run.decode([0], [token])[0] for run in (executor, oracle))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for run in (executor, oracle):
        run.truncate(0, 30)
    found, expected = (run.decode([0], [IDS[30]])[0] for run in (executor, oracle))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    # planted: keys that stay turned
    executor.decode([0], [IDS[31]])
    executor.decode([0], [IDS[32]])
    executor.truncate(0, 30)
    executor._long[0] = False
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(executor.decode([0], [IDS[30]])[0], expected, rtol=0, atol=1e-5)


def test_planted_faults_are_caught() -> None:
    """A stale row of the cache and an offset of one in the angles change the logits by more than the bound."""
    model = model_of("plain")
    stale = executor_of("plain")
    stale.prefill(0, IDS[40:48])
    stale.truncate(0, 8)  # the first 8 keys are those of another prompt
    with pytest.raises(AssertionError):
        assert_close(stale.prefill(0, IDS[8:20]), model, IDS[:20])
    shifted = executor_of("plain")
    shifted.prefill(0, IDS[:1])
    shifted._decoder._angles[:] = np.roll(shifted._decoder._angles, -1, axis=1)
    with pytest.raises(AssertionError):
        assert_close(shifted.prefill(0, IDS[1:20]), model, IDS[:20])


def test_a_random_history_leaves_nothing_behind() -> None:
    """Extend, verify, keep, truncate in any order: the next token is that of a fresh row with the same text."""
    rng = np.random.default_rng(1)
    executor, texts = executor_of("plain", batch=3, threads=2), [[1], [2], [3]]
    for row in range(2):
        executor.prefill(row, texts[row])
    for _ in range(60):
        row, length = int(rng.integers(2)), 0
        text = texts[row]
        count = int(rng.integers(1, 12))
        new = rng.integers(0, 61, count).tolist()
        action = rng.integers(4)
        if action == 0 or len(text) > 300:
            length = int(rng.integers(1, len(text) + 1))
            executor.truncate(row, length)
            del text[length:]
        elif action == 1:
            executor.prefill(row, new)
            text += new
        else:
            parents = [int(rng.integers(-1, i)) for i in range(count)]
            executor.verify(row, new, parents)
            path = [int(rng.integers(count))]
            while parents[path[0]] >= 0:
                path.insert(0, parents[path[0]])
            executor.keep(row, len(text), path)
            text += [new[index] for index in path]
        poison(executor)
        token = int(rng.integers(61))
        found = executor.decode([row], [token])[0]
        text.append(token)
        executor.truncate(2, 0)
        np.testing.assert_array_equal(found, executor.prefill(2, text))
    executor.close()


def test_hidden_states_are_those_of_the_model() -> None:
    model = model_of("odd")
    executor = executor_of("odd", batch=2, chunk_length=7, capture_layers=(0, 2, 1))
    executor.prefill(0, IDS[:20])
    with torch.no_grad():
        states = model.hidden_states(torch.tensor([IDS[:20]]))
    expected = torch.cat((states[2], states[0])).numpy()
    np.testing.assert_allclose(executor.hidden(0, [2, 0]), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    executor.decode([1, 0], [5, 3])
    assert executor.hidden(0, [1]).shape == (1, 1, 50)
    with pytest.raises(RuntimeError, match="capture_layers"):
        executor_of("odd").hidden(0, [1])


def test_greedy_text_is_that_of_the_reference_decoder() -> None:
    """On the embedded weights, wherever the reference itself is sure: no near-tie comes up in these prompts."""
    model, tokenizer = load()
    assert tokenizer is not None
    executor = CPUExecutor(model.float(), max_length=256, cache="float32", threads=2)
    for prompt in ("import os\nimport sys\n\n\nclass Reader:\n    def __init__(", "def main(", "for i in"):
        ids = tokenizer.encode(prompt)
        expected = list(generate(model, torch.tensor([ids]), 128))
        executor.truncate(0, 0)
        logits, found = executor.prefill(0, ids), []
        for _ in range(128):
            found.append(int(logits.argmax()))
            logits = executor.decode([0], [found[-1]])[0]
        assert found == expected
    executor.close()


def test_missing_barriers_are_noticed() -> None:
    """Threads that do not wait for one another read what is not there yet. With the counter of arrivals far ahead every
    barrier lets everybody pass."""
    executor = executor_of("plain", threads=3)
    right = executor.prefill(0, IDS[:70])
    for _ in range(20):
        executor.truncate(0, 0)
        np.testing.assert_array_equal(executor.prefill(0, IDS[:70]), right)
    decoder, caught = executor._decoder, False
    decoder._control[ARRIVED] += 10**9
    for _ in range(20):
        executor.truncate(0, 0)
        caught = caught or not np.array_equal(executor.prefill(0, IDS[:70]), right)
    assert caught
    executor.close()


def test_a_closed_or_forgotten_executor_ends_its_threads() -> None:
    before = threading.active_count()
    executor = executor_of("plain", threads=3)
    assert threading.active_count() == before + 2
    time.sleep(0.2)  # its threads have gone to sleep by now, and are woken again
    executor.prefill(0, IDS[:5])
    executor.close()
    executor.close()
    assert threading.active_count() == before
    executor = executor_of("plain", threads=3)
    del executor
    gc.collect()
    assert threading.active_count() == before


def test_the_number_of_threads_is_measured() -> None:
    executor = executor_of("plain", threads=None)
    assert 1 <= executor.threads <= len(os.sched_getaffinity(0))
    executor.close()


@pytest.mark.parametrize("settings", [{"cache": "float16"}, {"weights": "bfloat16"}])
def test_shorter_numbers_cost_what_they_round_away(settings: dict[str, str]) -> None:
    """Keys and values in float16 (2^-11 of each) or matrices in bfloat16 (2^-9): errors stay within a few such
    roundings, and they are there, so the setting does something."""
    model, executor = model_of("plain"), executor_of("plain", **settings)
    with torch.no_grad():
        expected = model(torch.tensor([IDS[:90]]))[0, -1].numpy()
    error = np.abs(executor.prefill(0, IDS[:90]) - expected).max() / np.abs(expected).max()
    rounding = 2.0**-11 if "cache" in settings else 2.0**-9
    assert rounding / 100 < error < 4 * rounding


def test_mistakes_are_refused_before_anything_changes() -> None:
    executor = executor_of("plain", batch=2, max_length=10, verify_length=4)
    executor.prefill(0, IDS[:6])
    refused = [
        (lambda: executor.prefill(2, [1]), "row = 2"),
        (lambda: executor.prefill(0, []), "empty"),
        (lambda: executor.prefill(0, [1, -1]), "token id -1"),
        (lambda: executor.decode([0], [61]), "token id 61"),
        (lambda: executor.prefill(0, [1, 2, 3, 4, 5]), "exceed max_length = 10"),
        (lambda: executor.prefill(1, [1, 2], final_length=1), "final_length = 1"),
        (lambda: executor.decode([0, 0], [1, 1]), "distinct rows"),
        (lambda: executor.verify(1, [1, 2, 3, 4, 5]), "verify_length = 4"),
        (lambda: executor.verify(0, [1, 2], [0, -1]), r"parents\[0\] = 0"),
        (lambda: executor.verify(0, [1, 2], [-1]), "1 parents for 2"),
        (lambda: executor.truncate(0, 9), "it holds 6"),
        (lambda: executor.keep(0, 4, [1, 0]), "ascending"),
        (lambda: executor.keep(0, 4, [2]), "into the 2 tokens"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()
    assert [executor.length(row) for row in (0, 1)] == [6, 0]
    for name, value in (("weights", "int3"), ("cache", "int8"), ("chunk_length", 0)):
        with pytest.raises(ValueError, match=f"{name} = {value!r}"):
            executor_of("plain", **{name: value})
    sparse = dataclasses.replace(CONFIGS["plain"], sparse_config=SparseConfig(dense_len=64))
    with pytest.raises(ValueError, match="dense_len = 64"):
        CPUExecutor(fresh_model(sparse, 0), max_length=64)


def test_memory_is_all_there_is() -> None:
    small, large = executor_of("plain").memory(), executor_of("plain", batch=2).memory()
    assert large["cache"] == 2 * small["cache"] == 2 * 2 * 2 * 2 * 400 * 16 * 4  # D is filled up to 16
    assert small["weights"] >= 4 * CONFIGS["plain"].num_parameters()
