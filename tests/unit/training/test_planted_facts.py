"""Planted facts: every question is answerable from above it, distances are exact, halves of the words never mix."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from minicpm_ref.checkpoint import EMBEDDED
from minicpm_ref.data import Document, read_held_out
from minicpm_ref.model import MiniCPM
from minicpm_ref.tokenizer import Tokenizer
from minicpm_ref.training.planted_facts import FACT_SPACING, REPEATS, Planter, planted_batch, retrieval_accuracy

TOKENIZER = Tokenizer.load(EMBEDDED / "base" / "tokenizer.json")
PLANTER = Planter(TOKENIZER)
DOCUMENTS = read_held_out(EMBEDDED / "held_out.jsonl")
CODE = np.concatenate([np.array(ids) for ids in TOKENIZER.encode_batch([d.text for d in DOCUMENTS])])


def test_training_and_evaluation_share_no_fact() -> None:
    facts = {}
    for held_out in (False, True):
        rng = np.random.default_rng(0)
        facts[held_out] = {fact for _ in range(40) for fact in Planter(TOKENIZER, held_out).draw(rng, 100)}
        assert all(key != value for key, value in facts[held_out])
    assert not facts[False] & facts[True]
    assert len(facts[False]) > 3500
    assert len({key for key, _ in facts[True]}) == len(PLANTER.words) > 300


def test_a_small_vocabulary_is_refused() -> None:
    one_word = SimpleNamespace(vocab_size=9, decode=lambda ids: " word")
    with pytest.raises(ValueError, match="expected at least 16"):
        _ = Planter(one_word).words  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
def test_every_answer_can_be_read_above_its_question(seed: int) -> None:
    count = 6
    ids, answers = PLANTER.plant(CODE[:400], count, np.random.default_rng(seed))
    assert len(ids) == len(answers) == 400 + PLANTER.added(count)
    assert answers.sum() == count
    given, then = PLANTER.frame
    text = ids.tolist()
    for end in np.flatnonzero(answers):
        key, value = text[end - 1 : end + 1]
        assert text[end - 1 - len(then) : end - 1] == then
        fact = [*given, *[key, value] * REPEATS]
        assert any(text[i : i + len(fact)] == fact for i in range(end - len(fact)))


def test_planting_leaves_the_code_as_it_was() -> None:
    ids, _ = PLANTER.plant(CODE[:300], 4, np.random.default_rng(0))
    text = TOKENIZER.decode(ids.tolist())
    without = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(("# given", "# then")))
    assert without.split() == TOKENIZER.decode(CODE[:300].tolist()).split()


def test_the_facts_stand_where_they_were_asked_to() -> None:
    distances = [40, 100, 480]
    ids, answers = PLANTER.exam(CODE[:600], distances, 9, np.random.default_rng(1))
    text = ids.tolist()
    assert len(text) == 600
    assert answers[-1] == 599
    given, then = PLANTER.frame
    for distance, answer in zip(distances, answers, strict=True):
        key, value = text[answer - 1 : answer + 1]
        assert text[answer - 1 - len(then) : answer - 1] == then
        fact = [*given, *[key, value] * REPEATS]
        ends = [i + len(fact) for i in range(answer) if text[i : i + len(fact)] == fact]
        assert ends == [answer + 1 - distance]
    facts = sum(text[i : i + len(given)] == given for i in range(600))
    assert facts == 9 + len(distances)


@pytest.mark.parametrize("distances", [[0], [4], [700], [100, 110]])
def test_distances_that_do_not_fit_are_refused(distances: list[int]) -> None:
    with pytest.raises(ValueError, match="outside or on another line"):
        PLANTER.exam(CODE[:600], distances, 3, np.random.default_rng(0))


def test_more_facts_than_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="40 other facts: expected fewer"):
        PLANTER.exam(CODE[:100], [50], 40, np.random.default_rng(0))


def test_a_batch_is_a_function_of_its_generator_and_marks_targets() -> None:
    def draw(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        return planted_batch(CODE, PLANTER, rows=8, length=128, share=0.5, rng=np.random.default_rng(seed))

    inputs, targets, answers = draw(1)
    assert inputs.shape == targets.shape == answers.shape == (8, 128)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert all(torch.equal(a, b) for a, b in zip((inputs, targets, answers), draw(1), strict=True))
    assert not torch.equal(inputs, draw(2)[0])
    assert set(answers.sum(1).tolist()) == {0, 128 // FACT_SPACING}
    assert set(targets[answers].tolist()) <= set(PLANTER.words.tolist())


class Reader:
    """Stands in for a model: it looks up what followed the key, up to 200 tokens back, and guesses beyond."""

    device = torch.device("cpu")

    def hidden_states(self, ids: Tensor) -> list[Tensor]:
        states = torch.zeros(*ids.shape, 1, dtype=torch.int64)
        given = PLANTER.frame[0]
        for row, line in enumerate(ids.tolist()):
            for at, key in enumerate(line):
                for back in range(at - 1, max(3, at - 200), -1):
                    if line[back] == key and line[back - len(given) : back] == given:
                        states[row, at, 0] = line[back + 1]
        return [states]

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(hidden[..., 0], TOKENIZER.vocab_size).float()


def test_accuracy_is_one_for_a_reader_and_zero_beyond_its_reach() -> None:
    reader: MiniCPM = Reader()  # type: ignore[assignment]
    accuracy = retrieval_accuracy(reader, PLANTER, DOCUMENTS, 512, [32, 150, 400], samples=3, batch_tokens=1024)
    assert accuracy == {32: 1.0, 150: 1.0, 400: 0.0}


def test_a_vocabulary_without_a_value_for_a_key_is_refused_instead_of_searched_for_ever() -> None:
    """16 words are accepted, but half are keys, and of the other eight often none may be the value of some key."""
    small = Planter(TOKENIZER, held_out=True)
    small.__dict__["words"] = PLANTER.words[:16]
    outcomes = []
    for seed in range(6):
        try:
            outcomes.append(len(small.draw(np.random.default_rng(seed), 8)))
        except ValueError as error:
            outcomes.append(str(error))
    assert all(outcome == 8 or "expected a larger vocabulary, or fewer facts" in str(outcome) for outcome in outcomes)
    assert any(outcome != 8 for outcome in outcomes)


def test_too_little_text_is_refused() -> None:
    short = [Document("stdlib", "a.py", "x = 1\n")]
    with pytest.raises(ValueError, match="expected more than 512"):
        retrieval_accuracy(MiniCPM, PLANTER, short, 512, [16])  # type: ignore[arg-type]
