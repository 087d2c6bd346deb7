"""ScalingBench: the questions are answerable, the same everywhere, and a model's bits are those of a plain forward."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from minicpm_ref.checkpoint import EMBEDDED, load
from minicpm_ref.data import Document, read_held_out
from minicpm_ref.wind_tunnel import Question, answer, make_questions
from minicpm_ref.wind_tunnel.scaling_bench import CLOSERS, KINDS
from minicpm_ref.wind_tunnel.scoring import option_bits, solution_bytes

QUESTIONS = make_questions(read_held_out(EMBEDDED / "held_out.jsonl"))


def of(kind: str) -> list[Question]:
    return [question for question in QUESTIONS if question.kind == kind]


def test_every_kind_is_there_and_no_place_is_favoured() -> None:
    assert Counter(question.kind for question in QUESTIONS) == dict.fromkeys(KINDS, 40)
    places = Counter(question.answer for question in QUESTIONS)
    assert min(places.values()) > 25, f"{places}: a model that always takes one place should score about 1/4"
    assert all(len(question.options) == 4 for question in QUESTIONS)
    assert len({(question.kind, question.prompt) for question in QUESTIONS}) == len(QUESTIONS)


def test_the_order_of_the_files_changes_nothing() -> None:
    documents = read_held_out(EMBEDDED / "held_out.jsonl")
    assert make_questions(documents[::-1], 5) == make_questions(documents, 5)


def test_the_solutions_are_right() -> None:
    """Each kind checked by other means than those that made it."""
    text = {document.path: document.text for document in read_held_out(EMBEDDED / "held_out.jsonl")}
    for question in QUESTIONS:
        if question.kind != "arithmetic":
            assert question.prompt + question.solution in text[question.source]
    for question in of("arithmetic"):
        a, b = question.prompt.splitlines()[-1].removeprefix(">>> ").split(" + ")
        assert int(question.solution) == int(a) + int(b)
    for question in of("close_bracket"):
        assert CLOSERS[question.solution] in question.prompt
    for question in of("recall_name"):
        assert question.solution.strip() in question.prompt
    for question in of("indentation"):
        header = question.prompt.splitlines()[-1]
        assert header.endswith(":")
        assert question.solution.startswith("\n ")


def test_what_only_a_newer_python_reads_inside_an_f_string_makes_no_question() -> None:
    line = 'value = [first]\nname = f"{compute(value)[0]} and {value}"\n'
    questions = make_questions(
        [Document("stdlib", "a.py", "# a comment of some length, so that it is shown\n" * 3 + line)]
    )
    assert [question.prompt[-6:] for question in questions] == ["[first"]


def test_a_broken_file_gives_what_stands_before_the_break() -> None:
    text = "# a comment of some length, so that it is shown\n" * 3 + "value = (first)\nother = (\n"
    assert [question.kind for question in make_questions([Document("stdlib", "a.py", text)])] == ["close_bracket"]


def test_an_option_that_begins_with_another_is_refused() -> None:
    with pytest.raises(ValueError, match="begins with option"):
        Question("recall_name", "x =", (" node", " nodes", " a", " b"), 0, "a.py")


def test_bits_are_those_of_a_plain_forward() -> None:
    model, tokenizer = load(dtype=torch.float32)
    assert tokenizer is not None
    for question in (of("recall_name")[0], of("close_bracket")[0]):
        prompt = tokenizer.encode(question.prompt)
        for option, bits in zip(question.options, option_bits(model, tokenizer, question), strict=True):
            ids = tokenizer.encode(option, add_bos=False)
            log_p = torch.log_softmax(model(torch.tensor([prompt + ids]))[0].double(), -1)
            places = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
            expected = -sum(log_p[place, token].item() for place, token in zip(places, ids, strict=True)) / math.log(2)
            assert bits == pytest.approx(expected, abs=1e-3)


def test_loss_is_total_bits_over_total_bytes() -> None:
    model, tokenizer = load(dtype=torch.float32)
    assert tokenizer is not None
    few = [of("import_argument")[0], of("close_bracket")[0]]
    scored = answer("base", model, tokenizer, few)
    nbytes = solution_bytes(few)
    assert nbytes.tolist() == [len(question.solution.encode()) for question in few]
    assert scored.loss(nbytes) == pytest.approx(scored.bits.sum() / nbytes.sum())
    assert set(scored.right) <= {0.0, 1.0}
