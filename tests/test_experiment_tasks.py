"""The corpora and tests of the experiments."""

import json
import random
import re
from math import prod
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.documents import Document
from data_pipeline.preparing.sampling import is_validation
from experiments.tasks import TASKS, VALIDATION_FRACTION
from experiments.tasks.noise import with_typos
from experiments.tasks.words import real_words
from tests.launching import largest_file
from tidal_dist.errors import ConfigError, UserError

Samples = list[dict[str, str]]

_FEW = {"count": 300, "test_count": 20, "held_out": 5}
SMALL: dict[str, dict[str, Any]] = {
    "sums": {"digits": 3, "distinct": 50, "test_digits": [3, 12], **_FEW},
    "differences": {"max_digits": 4, "test_digits": [3], **_FEW},
    "many_operands": {"max_digits": 2, "test_digits": [2, 5], **_FEW},
    "multiplication": {"max_digits": 3, "factor_digits": 2, "test_digits": [3], **_FEW},
    "characters": _FEW,
    "spelling": _FEW,
    "reversal": _FEW,
    "counting": _FEW,
    "editing": _FEW,
    "rhyme": _FEW,
    "noise": {"train_bytes": 100_000, "train_typos": 0.01, "test_bytes": 5000, "held_out_bytes": 5000},
    "scripts": {"train_bytes": 100_000, "share": 0.1, "test_bytes": 5000, "held_out_bytes": 5000},
    "source": {"train_bytes": 300_000, "test_bytes": 20_000},
}
ABOUT_WORDS = ("characters", "spelling", "reversal", "counting", "editing", "rhyme")


def lines(path: Path) -> Samples:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write(folder: Path, name: str, seed: int = 1, **changes: Any) -> None:
    options = {key: value for key, value in (SMALL[name] | changes).items() if value is not None}
    TASKS[name].write(folder, options, seed)


class Written:
    """What a task wrote: training, held-out and test samples."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.train, self.held_out = lines(folder / "train.jsonl"), lines(folder / "held-out.jsonl")
        self.tests = {path.stem: lines(path) for path in sorted((folder / "tests").iterdir())}

    @property
    def all(self) -> Samples:
        return [*self.train, *self.held_out, *(sample for test in self.tests.values() for sample in test)]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    folder = tmp_path_factory.mktemp("corpora")
    for name in SMALL:
        write(folder / name, name)
    return {name: Written(folder / name) for name in SMALL}


def asked(samples: Samples) -> set[str]:
    return {sample.get("prompt") or sample["text"] for sample in samples}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.jsonl")}


def words_of(samples: Samples) -> set[str]:
    """The words that questions are about: longer than the letters and the words around them."""
    around = {"spell", "reverse", "count", "insert", "delete", "from", "does", "rhyme"}
    return {w for s in samples for w in s["prompt"].split()[1:] if len(w) > 3 and w not in around}


def test_every_task_is_tried_here() -> None:
    assert set(TASKS) == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_tests_are_new_and_validation_is_what_the_pipeline_holds_out(name: str, corpora: dict[str, Written]) -> None:
    corpus = corpora[name]
    assert corpus.tests
    for test in corpus.tests.values():
        assert not asked(test) & (asked(corpus.train) | asked(corpus.held_out))
    for samples, held_out in ((corpus.train, False), (corpus.held_out, True)):
        assert samples
        for sample in samples:
            document = Document(sample.get("answer") or sample["text"], sample.get("prompt", ""), ("", 0))
            assert is_validation(document, VALIDATION_FRACTION) == held_out


@pytest.mark.parametrize("name", SMALL)
def test_options_and_seed_decide(name: str, corpora: dict[str, Written], tmp_path: Path) -> None:
    for folder, seed in (("again", 1), ("other", 8)):
        write(tmp_path / folder, name, seed)
    first, again, other = map(content, (corpora[name].folder, tmp_path / "again", tmp_path / "other"))
    assert first == again
    assert first["train.jsonl"] != other["train.jsonl"]


@pytest.mark.parametrize("name", [name for name, options in SMALL.items() if "count" in options])
def test_so_many_problems(name: str, corpora: dict[str, Written]) -> None:
    corpus = corpora[name]
    assert len(corpus.train) == 300
    assert 1 <= len(asked(corpus.held_out)) == len(corpus.held_out) <= 5
    for test in corpus.tests.values():
        assert len(asked(test)) == len(test) == 20


def test_distinct_problems_are_repeated_evenly(corpora: dict[str, Written]) -> None:
    prompts = [sample["prompt"] for sample in corpora["sums"].train]
    assert len(set(prompts)) == 50
    assert {prompts.count(prompt) for prompt in prompts} == {6}
    assert prompts[:50] != prompts[50:100]


@pytest.mark.parametrize("name", ["sums", "differences", "many_operands", "multiplication"])
def test_arithmetic_is_right(name: str, corpora: dict[str, Written]) -> None:
    for sample in corpora[name].all:
        match = re.fullmatch(r"\d+( [-+*] \d+)+ =", sample["prompt"])
        assert match
        numbers = [int(n) for n in re.findall(r"\d+", sample["prompt"])]
        signs = set(re.findall(r"[-+*]", sample["prompt"]))
        (sign,) = signs
        right = {"+": sum(numbers), "-": numbers[0] - sum(numbers[1:]), "*": prod(numbers)}[sign]
        assert sample["answer"] == f" {right}"


def lengths(samples: Samples) -> set[tuple[int, ...]]:
    return {tuple(len(n) for n in re.findall(r"\d+", sample["prompt"])) for sample in samples}


def test_operands_have_the_digits_asked_for(corpora: dict[str, Written]) -> None:
    assert lengths(corpora["sums"].train) == {(3, 3)}
    assert lengths(corpora["sums"].tests["digits-12"]) == {(12, 12)}
    assert lengths(corpora["differences"].train) == {(a, b) for a in range(1, 5) for b in range(1, 5)}
    assert {len(n) for n in lengths(corpora["many_operands"].train)} == {3, 4}
    assert lengths(corpora["many_operands"].tests["operands-4-digits-5"]) == {(5, 5, 5, 5)}
    assert {b for _, b in lengths(corpora["multiplication"].train)} == {1, 2}
    assert lengths(corpora["multiplication"].tests["factor-2-digits-3"]) == {(3, 2)}


def test_weights_of_lengths(tmp_path: Path) -> None:
    write(tmp_path, "sums", digits=None, max_digits=3, distinct=None, digit_weights=[0.0, 0.0, 1.0])
    assert lengths(Written(tmp_path).train) == {(3, 3)}


@pytest.mark.parametrize("name", ["sums", "differences", "multiplication"])
@pytest.mark.parametrize("distinct", [None, 2000])
def test_what_is_tested_is_never_trained_where_there_is_little(name: str, distinct: int | None, tmp_path: Path) -> None:
    """Of the thousands of problems of two digits training has many hundreds, and the test many."""
    sizes = {"count": 3000, "test_count": 60, "distinct": distinct}
    write(tmp_path, name, digits=None, max_digits=2, test_digits=[2], **sizes)
    corpus = Written(tmp_path)
    for test in corpus.tests.values():
        assert not asked(test) & (asked(corpus.train) | asked(corpus.held_out))
    assert distinct is None or len(asked(corpus.train)) == distinct


@pytest.mark.parametrize("name", ABOUT_WORDS)
def test_tested_words_occur_nowhere_in_training(name: str, corpora: dict[str, Written]) -> None:
    corpus = corpora[name]
    trained = words_of(corpus.train) | words_of(corpus.held_out)
    for test in corpus.tests.values():
        assert not words_of(test) & trained


def right_answer(question: str) -> str:
    """By other means than the task's."""
    verb, *rest = question.split()
    word = rest[-1]
    if verb == "spell":
        return " ".join(list(word))
    if verb == "reverse":
        return "".join(reversed(word))
    if verb == "count":
        return str(sum(letter == rest[0] for letter in word))
    if verb == "insert":
        letters = list(word)
        letters.insert(int(rest[2]) - 1, rest[0])
        return "".join(letters)
    if verb == "delete":
        return "".join(letter for letter in word if letter != rest[0])
    if verb == "end":
        return word[len(word) - 3 :]
    assert verb == "does"
    return "yes" if rest[0][-3:] == word[-3:] else "no"


def test_answers_about_characters_are_right(corpora: dict[str, Written]) -> None:
    assert {sample["prompt"].split()[0] for sample in corpora["characters"].train} == {
        "spell",
        "reverse",
        "count",
        "insert",
        "delete",
        "end",
        "does",
    }
    for name in ABOUT_WORDS:
        for sample in corpora[name].all:
            assert sample["answer"] == " " + right_answer(sample["prompt"].removesuffix(" ="))


def test_answers_about_characters_cannot_be_guessed(tmp_path: Path) -> None:
    for name in ("counting", "rhyme"):
        write(tmp_path / name, name, count=3000)
    counts = [s["answer"] for s in Written(tmp_path / "counting").train]
    assert max(counts.count(answer) for answer in set(counts)) < 0.6 * len(counts)
    rhymes = [s["answer"] for s in Written(tmp_path / "rhyme").train if s["answer"] in (" yes", " no")]
    assert 0.35 < rhymes.count(" yes") / len(rhymes) < 0.65


def test_no_word_is_longer_than_asked_for(tmp_path: Path) -> None:
    write(tmp_path, "reversal", max_letters=5)
    assert {len(sample["answer"]) - 1 for sample in Written(tmp_path).all} == {4, 5}


def test_there_are_words_enough() -> None:
    words = real_words(False).words
    assert len(words) > 3000
    assert {"function", "returns", "object"} <= set(words) | set(real_words(True).words)


def test_more_problems_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^task sums, training: found only \d+ different problems, not 1000; "):
        write(tmp_path / "a", "sums", digits=1, distinct=1000, test_count=1)
    with pytest.raises(ConfigError, match=r"^task sums, test digits-1: found only "):
        write(tmp_path / "b", "sums", test_digits=[1])
    with pytest.raises(ConfigError, match=r"^task spelling, training: found only "):
        write(tmp_path / "c", "spelling", distinct=100_000, made_share=0.0)
    with pytest.raises(ConfigError, match=r"^task source, training: asks for 1000000000 bytes of text, there are "):
        write(tmp_path / "d", "source", train_bytes=10**9)
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sums", {"digit": 3}, "unknown key digit; did you mean digits?"),
        ("sums", {"count": "many"}, "count='many': "),
        ("sums", {"max_digits": 3}, "give either max_digits or digits"),
        ("sums", {"digit_weights": [1.0]}, "digit_weights needs as many"),
        ("sums", {"test_digits": None}, "test_digits is missing"),
        ("characters", {"kinds": ["singing"]}, "kinds.0='singing': "),
        ("noise", {"train_typos": 1.5}, "train_typos=1.5: "),
    ],
)
def test_wrong_options_are_one_clear_line(name: str, options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        write(tmp_path, name, **options)
    assert str(caught.value).startswith(f"task {name}, options: {message}")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_same_text_with_more_and_more_typos(corpora: dict[str, Written]) -> None:
    tests = corpora["noise"].tests
    names = ["typos-0", "typos-5", "typos-10", "typos-20"]
    assert set(tests) == set(names)
    clean = "".join(sample["text"] for sample in tests["typos-0"])
    shares = []
    for name in names:
        noisy = "".join(sample["text"] for sample in tests[name])
        shares.append(1 - len(set(_windows(noisy)) & set(_windows(clean))) / len(set(_windows(clean))))
    assert shares[0] == 0
    assert shares == sorted(set(shares))


def _windows(text: str) -> list[str]:
    return [text[i : i + 12] for i in range(len(text) - 11)]


def test_typos_at_their_share() -> None:
    rng = random.Random(3)
    assert with_typos("plain text, 1 + 2", 0.0, rng) == "plain text, 1 + 2"
    changed = [with_typos("x", 0.2, rng) != "x" for _ in range(20_000)]
    # A quarter of the typos swaps the letter with the next, of which there is none.
    assert 0.13 < sum(changed) / len(changed) < 0.17
    assert with_typos("1 + 2 = 3; ä", 1.0, rng) == "1 + 2 = 3; ä"


def test_little_of_other_scripts_in_training_and_much_in_tests(corpora: dict[str, Written]) -> None:
    def foreign(samples: Samples) -> float:
        text = "".join(sample["text"] for sample in samples)
        return sum(len(c.encode()) for c in text if not c.isascii()) / len(text.encode())

    corpus = corpora["scripts"]
    assert set(corpus.tests) == {"chinese", "greek", "emoji", "english"}
    assert 0.03 < foreign(corpus.train) < 0.15
    assert foreign(corpus.tests["chinese"]) == 1
    assert foreign(corpus.tests["greek"]) > 0.8
    assert foreign(corpus.tests["emoji"]) > 0.2
    assert foreign(corpus.tests["english"]) < 0.01


def test_sizes_of_text(corpora: dict[str, Written]) -> None:
    size = sum(len(sample["text"].encode()) for sample in corpora["source"].train)
    last = len(corpora["source"].train[-1]["text"].encode())
    assert size - last < 300_000 <= size


def test_what_was_written_before_goes(tmp_path: Path) -> None:
    write(tmp_path, "sums", test_digits=[3, 12])
    write(tmp_path, "sums", test_digits=[4])
    assert set(Written(tmp_path).tests) == {"digits-4"}


def test_training_is_written_last_and_whole(tmp_path: Path) -> None:
    write(tmp_path, "sums")
    with largest_file(8000), pytest.raises(UserError, match=r"cannot write .*free space"):
        write(tmp_path, "sums")
    assert (tmp_path / "held-out.jsonl").exists()
    assert not (tmp_path / "train.jsonl").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
