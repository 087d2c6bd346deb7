"""Drafters without weights of their own: prompt lookup, and a model beside the target."""

from __future__ import annotations

import numpy as np
import pytest
from table_executor import TableExecutor, order_two

from minicpm_ref.speculative import Draft, ModelDrafter, NGramDrafter, Tally, speculate


def told(drafter, ids: list[int]):
    drafter.start(ids[0])
    drafter.extend(ids[1:], np.empty((len(ids) - 1, 0), np.float32))
    return drafter


def test_it_copies_what_followed_the_last_time() -> None:
    assert told(NGramDrafter(3, largest=2), [5, 6, 7, 8, 9, 10, 11, 7, 8]).propose(9) == Draft.chain([9, 10, 11])
    assert told(NGramDrafter(3, largest=2), [7, 8, 1, 7, 8, 2, 7, 8]).propose(9).tokens == [2, 7, 8]  # the latest place
    longest = told(NGramDrafter(2), [1, 2, 3, 4, 9, 3, 4, 8, 1, 2, 3, 4])
    assert longest.propose(9).tokens == [9, 3]  # four tokens match there, at the later place only two


@pytest.mark.parametrize("ids", [[1], [1, 2], [7, 8], [1, 2, 3]])
def test_nothing_to_copy_is_an_empty_draft(ids: list[int]) -> None:
    assert told(NGramDrafter(), ids).propose(5) == Draft()


def test_the_end_of_the_text_never_matches_itself() -> None:
    assert told(NGramDrafter(3, largest=2, smallest=2), [1, 1, 1]).propose(5).tokens == [1]
    assert told(NGramDrafter(3, largest=2, smallest=2), [7, 8]).propose(5) == Draft()


def test_limits_and_end_ids_cut_the_copy() -> None:
    ids = [5, 6, 7, 8, 9, 10, 11, 7, 8]
    assert told(NGramDrafter(8), ids).propose(2).tokens == [9, 10]
    assert told(NGramDrafter(8), ids).propose(0) == Draft()
    assert told(NGramDrafter(8, stop_ids=[10]), ids).propose(5).tokens == [9]
    assert told(NGramDrafter(8, stop_ids=[9, 11]), ids).propose(5) == Draft()


def test_it_stops_while_it_does_not_pay_and_tries_again() -> None:
    """A text that repeats its pairs but never what follows them, and then repeats itself for good."""
    random = np.random.default_rng(0)
    noise = [token for i in range(60) for token in (1, 2, 3 + int(random.integers(200)))]
    cycle = list(range(300, 320)) * 12
    drafter = NGramDrafter(4, largest=2)
    drafter.start(0)
    proposed = []
    for token in [*noise, *cycle]:
        proposed.append(len(drafter.propose(4).tokens))
        drafter.extend([token], np.empty((1, 0), np.float32))
    eager = NGramDrafter(4, largest=2, always=True)
    eager.start(0)
    costs = []
    for token in [*noise, *cycle]:
        costs.append(len(eager.propose(4).tokens))
        eager.extend([token], np.empty((1, 0), np.float32))
    n = len(noise)
    assert sum(proposed[:n]) < sum(costs[:n]) / 3  # quiet in the noise
    assert sum(proposed[n + 60 :]) == sum(costs[n + 60 :]) > 0  # and back when there is something to copy


def test_a_cost_that_is_never_paid_keeps_it_quiet() -> None:
    """Where each verified token costs a step of its own, copying cannot win; where it is free, it always may try."""
    ids = [1, 2, 3, 4] * 50
    for cost, quiet in ((lambda n: 1.2 * n, True), (lambda n: 1.0, False)):
        drafter = NGramDrafter(4, cost=cost)
        drafter.start(0)
        rounds = []
        for start in range(0, 200, 5):
            rounds.append(len(drafter.propose(4).tokens))
            drafter.extend(ids[start : start + 5], np.empty((5, 0), np.float32))
        assert (sum(map(bool, rounds[3:])) < 10) == quiet


def test_a_model_drafts_for_itself_without_a_miss() -> None:
    """The target as its own draft model: every draft is right, and the draft's row follows the text exactly."""
    logits = order_two()
    for length in (1, 3, 4):
        helper, tally = TableExecutor(logits), Tally()
        drafter = ModelDrafter(helper, length)
        text = list(speculate(TableExecutor(logits), drafter, [3, 1, 4], 101, tally=tally))
        assert len(text) == 101
        assert tally.reached == [tally.rounds] * length or tally.rounds * (length + 1) >= 100
        assert tally.acceptance_length > length + 0.8
        assert helper.ids == [3, 1, 4, *text][: len(helper.ids)]


def test_a_worse_model_is_cut_back_to_the_text() -> None:
    """After every round the draft's row is a beginning of the text, whatever was accepted."""
    target, other = order_two(), order_two(seed=1)

    def mixed(ids: list[int]) -> np.ndarray:
        return other(ids) if ids[-1] % 3 == 0 else target(ids)

    helper = TableExecutor(mixed)
    prefills: list[list[int]] = []
    original = helper.prefill

    def prefill(row, ids, final_length=None):
        prefills.append([*helper.ids, *ids])
        return original(row, ids, final_length)

    helper.prefill = prefill  # type: ignore[method-assign]
    tally = Tally()
    text = list(speculate(TableExecutor(target), ModelDrafter(helper, 4), [3, 1, 4], 80, tally=tally))
    whole = [3, 1, 4, *text]
    assert all(ids == whole[: len(ids)] for ids in prefills)
    assert 1.0 < tally.acceptance_length < 5.0


def test_a_full_draft_row_ends_the_drafting() -> None:
    logits = order_two()
    text = list(speculate(TableExecutor(logits), ModelDrafter(TableExecutor(logits, 20)), [3, 1, 4], 60))
    assert text == list(speculate(TableExecutor(logits), NGramDrafter(), [3, 1, 4], 60))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: NGramDrafter(length=0), "length = 0"),
        (lambda: NGramDrafter(smallest=0), "smallest = 0"),
        (lambda: NGramDrafter(smallest=3, largest=2), "largest = 2"),
        (lambda: ModelDrafter(TableExecutor(order_two()), 0), "length = 0"),
    ],
)
def test_what_is_refused(build, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()
