"""The drafting loop against plain decoding, with a target that is a table and drafters that are right or wrong at will.

Speculative text must be the text of plain decoding: token for token, for every seed and setting, wherever it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from table_executor import CONFIG, RandomTree, Scripted, TableExecutor, order_two

from minicpm_ref.config import LongRope, SparseConfig
from minicpm_ref.sampling import SamplingParams, choose_token
from minicpm_ref.speculative import Draft, NGramDrafter, Speculation, Tally, speculate
from minicpm_ref.speculative import loop as loop_module
from minicpm_ref.speculative.acceptance import Acceptance, match_path

PROMPT = [3, 1, 4]
LOGITS = order_two()
VOCABULARY = CONFIG.vocab_size


def plain(
    params: SamplingParams, length: int, prompt: Sequence[int] = PROMPT, stop_ids: Sequence[int] = (), logits=LOGITS
) -> list[int]:
    """Decoding a token at a time."""
    random, output = params.generator(), []
    while len(output) < length:
        token = choose_token(logits([*prompt, *output]), params, random.random(), prompt, output)
        if token in stop_ids:
            break
        output.append(token)
    return output


def wrong(token: int, place: int) -> int:
    return (token + 1) % VOCABULARY


def every_second(token: int, place: int) -> int:
    return wrong(token, place) if place % 2 else token


def drafters(text: list[int]) -> dict[str, object]:
    """Drafters that know the text after the prompt."""
    known = [*PROMPT, *text]
    return {
        **{f"oracle {k}": Scripted(known, k) for k in (1, 2, 5, 8)},
        "adversary": Scripted(known, 4, wrong),
        "every second": Scripted(known, 6, every_second),
        "tree": RandomTree(known, 12),
        "ngram": NGramDrafter(smallest=1, always=True),
        "nothing": Scripted(known, 0, layers=()),
    }


GREEDY = SamplingParams()
SETTINGS = {
    "greedy": GREEDY,
    "temperature": SamplingParams(0.9, seed=1),
    "tiny": SamplingParams(1e-6, seed=1),
    "top-k": SamplingParams(1.0, top_k=3, seed=2),
    "top-p": SamplingParams(1.2, top_p=0.8, seed=3),
    "min-p": SamplingParams(1.1, min_p=0.2, seed=4),
    "repetition": SamplingParams(repetition_penalty=1.6),
    "penalties": SamplingParams(0.8, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2, seed=5),
    "bias": SamplingParams(0.8, logit_bias={3: -100, 5: 2.0}, seed=6),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_text_is_that_of_plain_decoding(setting: str) -> None:
    params = SETTINGS[setting]
    expected = plain(params, 60)
    for name, drafter in drafters(expected).items():
        found = list(speculate(TableExecutor(LOGITS), drafter, PROMPT, 60, params))
        assert found == expected, name


def test_an_oracle_gives_all_its_drafts_and_one_more() -> None:
    """D9: g + 1 tokens a round and one target call a round; without the bonus token it would be g."""
    expected = plain(GREEDY, 61)
    for length in (1, 3, 7):
        executor, tally = TableExecutor(LOGITS), Tally()
        assert list(speculate(executor, Scripted([*PROMPT, *expected], length), PROMPT, 61, tally=tally)) == expected
        full = 60 // (length + 1)
        assert executor.calls[:full] == [length + 1] * full
        assert len(executor.calls) == tally.rounds
        assert tally.acceptance_length == pytest.approx(60 / tally.rounds)
        assert 1 + sum(tally.rates) == pytest.approx(tally.acceptance_length)


def test_an_adversary_gives_one_token_a_round() -> None:
    expected = plain(GREEDY, 30)
    tally = Tally()
    drafter = Scripted([*PROMPT, *expected], 4, wrong)
    assert list(speculate(TableExecutor(LOGITS), drafter, PROMPT, 30, tally=tally)) == expected
    assert (tally.acceptance_length, tally.rounds, tally.reached) == (1.0, 29, [])


def test_the_first_draft_is_checked() -> None:
    """Prompt [1, 1, 1], n-gram draft [1], the target says 5."""

    def five(ids: list[int]) -> np.ndarray:
        return np.eye(VOCABULARY, dtype=np.float32)[1 if len(ids) == 3 else 5]

    drafter = NGramDrafter(smallest=1, always=True)
    assert list(speculate(TableExecutor(five), drafter, [1, 1, 1], 2)) == [1, 5]


@pytest.mark.parametrize("ends", [0, 1, 2])
def test_every_end_inside_a_round(ends: int) -> None:
    """D10: each token of the text in turn is an end id, first, inside or last in a round; also the length."""
    text = plain(GREEDY, 24)
    for place in range(24):
        stop = [text[place], (text[place] + 5) % VOCABULARY][:ends]
        for limit in (place, place + 1, place + 3):
            expected = plain(GREEDY, limit, stop_ids=stop)
            for length in (1, 3, 8):
                drafter = Scripted([*PROMPT, *text], length)
                found = list(speculate(TableExecutor(LOGITS), drafter, PROMPT, limit, stop_ids=stop))
                assert found == expected


def test_what_comes_after_an_end_reaches_nothing() -> None:
    """Neither cache, history nor tally hold what was drafted behind an end id."""
    text = plain(GREEDY, 12)
    executor = TableExecutor(LOGITS)
    speculation = Speculation(executor, 0, Scripted([*PROMPT, *text], 8))
    executor.prefill(0, PROMPT)
    speculation.prefilled(PROMPT)
    stop = next(token for token in text[2:] if token not in text[: text.index(token)])
    emitted = speculation.round(text[0], lambda logits, ahead: int(logits.argmax()), 9, [stop])
    assert emitted == text[1 : text.index(stop) + 1]
    assert executor.ids == [*PROMPT, *text[: text.index(stop)]]
    assert speculation.tally.emitted == len(emitted)


def test_the_cache_holds_the_text_without_its_last_token() -> None:
    """D3 and trap 4.1, after each round, for every kind of draft."""
    text = plain(GREEDY, 500)
    for name, drafter in drafters(text).items():
        executor = TableExecutor(LOGITS)
        output = []
        for token in speculate(executor, drafter, PROMPT, 200):
            output.append(token)
            assert executor.ids[: len(PROMPT) + len(output)] == [*PROMPT, *output][: len(executor.ids)], name
        assert len(executor.ids) == len(PROMPT) + 199, name


def test_the_oracle_stays_right_for_500_tokens() -> None:
    tally, text = Tally(), plain(GREEDY, 501)
    list(speculate(TableExecutor(LOGITS), Scripted([*PROMPT, *text], 4), PROMPT, 501, tally=tally))
    assert (tally.rounds, tally.emitted) == (100, 500)


def test_a_prompt_in_pieces_is_told_once_and_in_order() -> None:
    """Trap 4.3: the last token of a piece is paired with the first of the next, whatever the pieces (`Scripted`
    asserts the pairs)."""
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    for piece in (1, 3, 4, 10):
        executor = TableExecutor(LOGITS)
        drafter = Scripted([*prompt, 0], 0)
        speculation = Speculation(executor, 0, drafter)
        for start in range(0, 10, piece):
            executor.prefill(0, prompt[start : start + piece], final_length=10)
            speculation.prefilled(prompt[start : start + piece])
        speculation.round(7, lambda logits, ahead: 3, 1)
        assert drafter.text == [*prompt, 7]


def test_a_full_row_and_a_border_cut_the_draft() -> None:
    text = plain(GREEDY, 40)
    executor = TableExecutor(LOGITS, max_length=20)
    drafter = Scripted([*PROMPT, *text], 8)
    assert list(speculate(executor, drafter, PROMPT, 18)) == text[:18]  # 3 + 17 tokens fill the row
    assert len(executor.ids) == 20
    sparse = SparseConfig(kernel_size=4, kernel_stride=2, block_size=4, window_size=8, topk=2, dense_len=16)
    rope = LongRope((1.0, 1.0), (2.0, 2.0), original_max_position_embeddings=12)
    for config, borders in (
        (replace(CONFIG, sparse_config=sparse), {15}),
        (replace(CONFIG, rope_scaling=rope), {12}),
        (replace(CONFIG, sparse_config=sparse, rope_scaling=rope), {12, 15}),
    ):
        executor = TableExecutor(LOGITS)
        executor.config = config
        reached = {0}
        original = executor.verify

        def verify(row, ids, parents=None, original=original, executor=executor, reached=reached, borders=borders):
            base = executor.length(0)
            assert not any(base < border < base + len(ids) for border in borders)
            reached.add(base + len(ids))
            return original(row, ids, parents)

        executor.verify = verify  # type: ignore[method-assign]
        assert list(speculate(executor, Scripted([*PROMPT, *text], 5), PROMPT, 30)) == text[:30]
        assert borders <= reached | {executor.length(0)}


def test_a_chooser_sees_the_tokens_of_the_round_before_its_own() -> None:
    """What a grammar needs: it is called once for each emitted token, in order, and never for a rejected branch."""
    text = plain(GREEDY, 30)
    executor = TableExecutor(LOGITS)
    speculation = Speculation(executor, 0, RandomTree([*PROMPT, *text], 10))
    executor.prefill(0, PROMPT)
    speculation.prefilled(PROMPT)
    output = [text[0]]
    while len(output) < 25:
        seen: list[list[int]] = []

        def choose(logits: np.ndarray, ahead: list[int], seen=seen) -> int:
            seen.append(ahead)
            return int(logits.argmax())

        emitted = speculation.round(output[-1], choose, 25 - len(output))
        assert seen == [emitted[:i] for i in range(len(emitted))]
        output += emitted
    assert output == text[:25]


def test_mistakes_are_refused() -> None:
    speculation = Speculation(TableExecutor(LOGITS), 0, Scripted([], 0))
    with pytest.raises(ValueError, match="before prefilled"):
        speculation.round(1, lambda logits, ahead: 1, 3)
    with pytest.raises(ValueError, match="most = 0"):
        speculation.round(1, lambda logits, ahead: 1, 0)
    with pytest.raises(ValueError, match=r"parents\[1\] = 1"):
        Draft([1, 2], [-1, 1])
    with pytest.raises(ValueError, match="2 tokens and 1 parents"):
        Draft([1, 2], [-1])
    assert list(speculate(TableExecutor(LOGITS), NGramDrafter(), PROMPT, 0)) == []


def test_a_part_of_a_draft_is_a_draft() -> None:
    tree = Draft([5, 6, 7, 8, 9], [-1, 0, 0, 2, 1])
    assert tree.depths == [1, 2, 2, 3, 3]
    assert tree.within(9, 2) == Draft([5, 6, 7], [-1, 0, 0])
    assert tree.within(2, 9) == Draft([5, 6], [-1, 0])
    assert tree.within(9, 9, [6]) == Draft([5, 7, 8], [-1, 0, 1])
    assert tree.within(9, 9, [5]) == tree.within(0, 9) == tree.within(-1, 9) == Draft()
    assert [draft.is_chain for draft in (Draft.chain([1, 2]), Draft(), tree)] == [True, True, False]


# ---- planted faults: each must be caught by a comparison above -------------------------------------------------------


def first_draft_unchecked(choose, tokens, parent) -> Acceptance:
    """Goes to the first draft whatever was chosen before it."""
    if len(tokens) < 2:
        return match_path(choose, tokens, parent)
    choose(0)
    found = match_path(lambda node: choose(node + 1), tokens[1:], [-1, *(p - 1 for p in parent[2:])])
    return Acceptance([tokens[1], *found.tokens], [0, *(node + 1 for node in found.path)])


def wrong_row(choose, tokens, parent) -> Acceptance:
    """Judges a draft by the row after it."""
    return match_path(lambda node: choose(min(node + 1, len(tokens) - 1)), tokens, parent)


@pytest.mark.parametrize("fault", [first_draft_unchecked, wrong_row])
def test_a_faulty_walk_changes_the_text(fault, monkeypatch) -> None:
    expected = plain(GREEDY, 40)
    drafter = Scripted([*PROMPT, *expected], 6, wrong, layers=())
    assert list(speculate(TableExecutor(LOGITS), drafter, PROMPT, 40)) == expected
    monkeypatch.setattr(loop_module, "match_path", fault)
    assert list(speculate(TableExecutor(LOGITS), drafter, PROMPT, 40)) != expected


class Stale(TableExecutor):
    """Keeps rejected tokens."""

    def keep(self, row: int, base: int, path: Sequence[int]) -> None:
        self.ids = self.ids[: base + len(path)]  # a tree's nodes as if they were the first ones


def test_a_cache_that_is_not_compacted_changes_the_text() -> None:
    expected = plain(GREEDY, 40)
    assert list(speculate(Stale(LOGITS), RandomTree([*PROMPT, *expected], 12), PROMPT, 40)) != expected


@pytest.mark.parametrize("fault", ["penalty without ancestors", "stop drafted", "border unseen"])
def test_faults_of_the_loop_are_caught(fault: str, monkeypatch) -> None:
    if fault == "penalty without ancestors":
        params, original = SETTINGS["penalties"], choose_token

        def forgetful(logits, params, uniform, prompt, output):
            return original(logits, params, uniform, prompt, output[: len(output) - 1])

        expected = plain(params, 60)
        monkeypatch.setattr(loop_module, "choose_token", forgetful)
        assert list(speculate(TableExecutor(LOGITS), Scripted([*PROMPT, *expected], 5), PROMPT, 60, params)) != expected
    elif fault == "stop drafted":  # a stop id inside the accepted path: what follows it must not reach the cache
        monkeypatch.setattr(Draft, "within", lambda self, nodes, depth, banned=(): self)
        with pytest.raises(AssertionError):
            test_what_comes_after_an_end_reaches_nothing()
    else:
        monkeypatch.setattr(loop_module, "next_border", lambda config, length: None)
        with pytest.raises(AssertionError):
            test_a_full_row_and_a_border_cut_the_draft()
