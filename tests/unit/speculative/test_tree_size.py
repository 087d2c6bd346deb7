"""The choice of how much to draft, on timings made by hand."""

from __future__ import annotations

import itertools

import pytest
from table_executor import TableExecutor, order_two

from minicpm_ref.speculative import best_size, cached_verify, chain_gain, measure_verify, seconds_at


def test_gain_of_a_chain() -> None:
    """tau = (1 - a^(g + 1)) / (1 - a): the table of the specification for three drafts."""
    for rate, tau in ((0.5, 1.875), (0.6, 2.176), (0.7, 2.533), (0.8, 2.952), (0.9, 3.439)):
        assert chain_gain([rate] * 3)[-1] == pytest.approx(tau, abs=5e-4)


def test_the_best_chain_of_the_published_cost_model() -> None:
    """Free verification, drafts at 5 % of a step: (1 - a^(g + 1)) / (1 - a) / (1 + 0.05 g) at its largest."""
    free = {1: 1.0, 64: 1.0}
    for rate, drafts in ((0.5, 3), (0.6, 4), (0.7, 6), (0.8, 8)):
        emitted = dict(enumerate(chain_gain([rate] * 20), 1))
        size, gain = best_size(emitted, free, lambda n: 0.05 * (n - 1))
        speeds = [(1 - rate ** (g + 1)) / (1 - rate) / (1 + 0.05 * g) for g in range(21)]
        assert (size, gain) == (drafts + 1, pytest.approx(max(speeds)))


def test_the_measured_ratios_of_a_small_machine() -> None:
    """4-bit weights on two cores, acceptance 0.7, drafts at 5 %: a chain of four gains 1.86 (the prototype's table)."""
    verify = {1: 1.0, 2: 1.05, 4: 1.22, 8: 1.50, 16: 2.52}
    size, gain = best_size(dict(enumerate(chain_gain([0.7] * 15), 1)), verify, lambda n: 0.05 * (n - 1))
    assert (size, round(gain, 2)) == (5, 1.86)


def test_a_draft_that_does_not_pay_loses_to_plain_decoding() -> None:
    by_step = {1: 1.0, 2: 2.0, 3: 3.0}
    assert best_size({2: 1.9, 3: 2.5}, by_step) == (1, 1.0)
    assert best_size({2: 1.9}, {1: 1.0, 2: 1.0}, lambda n: 5.0)[0] == 1


def test_between_and_beyond_the_measured_sizes() -> None:
    measured = {1: 1.0, 2: 1.2, 4: 2.0}
    assert seconds_at(measured, 3) == pytest.approx(1.6)
    assert seconds_at(measured, 8) == pytest.approx(3.6)
    assert seconds_at(measured, 4) == 2.0
    with pytest.raises(ValueError, match="size 1"):
        seconds_at({2: 1.0, 3: 1.0}, 1)


def test_measuring_takes_medians_in_turns_and_leaves_the_row_empty() -> None:
    executor = TableExecutor(order_two())
    ticks = itertools.count()
    found = measure_verify(executor, (1, 4), context=5, rounds=3, clock=lambda: float(next(ticks)))
    assert found == {1: 1.0, 4: 1.0}
    assert executor.calls == [1, 4] * 4
    assert executor.ids == []
    with pytest.raises(ValueError, match="exceed max_length = 8"):
        measure_verify(TableExecutor(order_two(), 8), (1, 4), context=5)


def test_timings_are_measured_once_a_key(tmp_path) -> None:
    path, calls = tmp_path / "a" / "verify.json", []

    def measure() -> dict[int, float]:
        calls.append(1)
        return {1: 0.5, 8: 0.75}

    assert cached_verify("one", measure, path) == cached_verify("one", measure, path) == {1: 0.5, 8: 0.75}
    assert cached_verify("two", measure, path) == {1: 0.5, 8: 0.75}
    assert len(calls) == 2
    path.write_text("{")
    with pytest.raises(ValueError, match="Expecting property name"):
        cached_verify("one", measure, path)


def test_the_cache_folder_is_the_users(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached_verify("one", lambda: {1: 1.0})
    assert (tmp_path / "minicpm_ref" / "verify_seconds.json").is_file()
