import json
import re
from itertools import islice
from pathlib import Path

import pytest

from data_pipeline.arithmetic import (
    MAX_DIGITS,
    held_out_problems,
    is_held_out,
    problems,
    training_problems,
    write_corpus,
)

PROBLEM = re.compile(r"(-?\d+) ([+-]) (-?\d+) =")


def operands(prompt: str) -> tuple[int, str, int]:
    match = PROBLEM.fullmatch(prompt)
    assert match
    return int(match[1]), match[2], int(match[3])


def check_answer(prompt: str, answer: str) -> None:
    a, sign, b = operands(prompt)
    assert answer == f" {a + b if sign == '+' else a - b}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """A written corpus, read back."""
    path = tmp_path_factory.mktemp("arithmetic") / "corpus.jsonl"
    write_corpus(path, 50_000, seed=1)
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [(record["prompt"], record["answer"]) for record in records]


def test_the_corpus_has_right_answers(corpus: list[tuple[str, str]]) -> None:
    assert len(corpus) == 50_000
    for prompt, answer in corpus:
        check_answer(prompt, answer)


@pytest.mark.slow
def test_held_out_problems_never_occur_in_the_corpus(corpus: list[tuple[str, str]]) -> None:
    written = {prompt for prompt, _ in corpus}
    assert not any(is_held_out(prompt) for prompt in written)
    for digits in (None, 2, 3, 4):
        tested = {prompt for prompt, _ in held_out_problems(150, seed=5, digits=digits)}
        assert not written & tested


@pytest.mark.parametrize("digits", [None, 2, 4])
def test_held_out_problems_are_distinct_and_right(digits: int | None) -> None:
    found = held_out_problems(200, seed=2, digits=digits)
    assert len({prompt for prompt, _ in found}) == len(found) == 200
    for prompt, answer in found:
        assert is_held_out(prompt)
        check_answer(prompt, answer)


@pytest.mark.slow
def test_digits_of_the_operands() -> None:
    for digits in (2, 3, 4):
        for prompt, _ in held_out_problems(100, seed=1, digits=digits):
            a, _, b = operands(prompt)
            assert len(str(abs(a))) == len(str(abs(b))) == digits
    mixed = [abs(n) for prompt, _ in held_out_problems(1000, seed=1) for n in operands(prompt)[::2]]
    for digits in range(1, MAX_DIGITS + 1):  # rather fewer of the short ones, which repeat
        assert 0.15 < sum(len(str(n)) == digits for n in mixed) / len(mixed) < 0.35


def test_all_lengths_of_operands_are_trained(corpus: list[tuple[str, str]]) -> None:
    lengths = {tuple(len(str(abs(n))) for n in operands(prompt)[::2]) for prompt, _ in corpus}
    assert lengths == {(a, b) for a in range(1, MAX_DIGITS + 1) for b in range(1, MAX_DIGITS + 1)}


@pytest.mark.slow
@pytest.mark.timeout(20)
def test_more_held_out_problems_than_there_are() -> None:
    with pytest.raises(ValueError, match="1 digits"):
        held_out_problems(1000, seed=1, digits=1)


def test_both_signs_occur(corpus: list[tuple[str, str]]) -> None:
    parts = [operands(prompt) for prompt, _ in corpus[:5000]]
    assert {sign for _, sign, _ in parts} == {"+", "-"}
    assert 0.15 < sum(a < 0 for a, _, _ in parts) / len(parts) < 0.25
    assert not any("-0" in prompt.split() for prompt, _ in corpus)


def test_one_problem_in_fifty_is_held_out() -> None:
    held_out = sum(is_held_out(prompt) for prompt, _ in islice(problems("share", (0, 0, 0, 1)), 20_000))
    assert 300 < held_out < 500


def test_the_seed_decides(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        write_corpus(tmp_path / name, 300, seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c
    assert held_out_problems(50, 1) == held_out_problems(50, 1) != held_out_problems(50, 2)
    # A longer corpus starts with the shorter one.
    assert list(training_problems(300, 7))[:100] == list(training_problems(100, 7))
