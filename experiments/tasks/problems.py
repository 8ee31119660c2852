"""Corpora of problems, prompt and answer, which are drawn at random: how many, how many different ones, which tests."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from pydantic import Field

from data_pipeline.section import Section
from experiments.tasks.writing import Corpus, Sample, is_held_out
from tidal_dist.errors import ConfigError

# No other problem after so many draws in a row for each that was found, and so many more: there are no others.
_DRAWS_IN_VAIN = 20
_LEAST_DRAWS_IN_VAIN = 1000
_HELD_OUT_DRAWS = 200  # for each that is held out; one in fifty is

# An endless stream of samples, drawn with the given generator.
Stream = Callable[[random.Random], Iterator[Sample]]


class ProblemOptions(Section):
    """How many problems there are."""

    count: int = Field(100_000, ge=1, description="lines of training")
    distinct: int | None = Field(None, ge=1, description="different ones among them, repeated; none: all are drawn")
    held_out: int = Field(256, ge=1, description="different problems of the same kind that are held out, at most")
    test_count: int = Field(200, ge=1, description="different problems of each test")


@dataclass(frozen=True)
class Problems:
    """Where problems come from: `training` draws none that a test may have, and `tests` those alone."""

    training: Stream
    tests: Mapping[str, Stream]


def corpus_of(name: str, problems: Problems, options: ProblemOptions, seed: int) -> Corpus:
    """The corpus that options and seed ask for.

    Raises:
        ConfigError: there are not so many different problems.
    """

    def generator(purpose: str) -> random.Random:
        return random.Random(f"{name} {purpose} {seed}")

    tests = {
        test: _exactly(stream(generator(test)), options.test_count, f"task {name}, test {test}")
        for test, stream in problems.tests.items()
    }
    train: Iterable[Sample] = (s for s in problems.training(generator("train")) if not is_held_out(s))
    if options.distinct is not None:
        different = _exactly(train, options.distinct, f"task {name}, training")
        train = _repeated(different, generator("order"))
    drawn = islice(problems.training(generator("held out")), _HELD_OUT_DRAWS * options.held_out)
    held_out = _different(filter(is_held_out, drawn), options.held_out)
    if not held_out:
        raise ConfigError(f"task {name}: none of its few problems is held out; choose options that allow more")
    return Corpus(islice(train, options.count), held_out, tests)


def _exactly(samples: Iterable[Sample], count: int, what: str) -> list[Sample]:
    """`count` different samples."""
    found = _different(samples, count)
    if len(found) < count:
        raise ConfigError(
            f"{what}: found only {len(found)} different problems, not {count}; ask for fewer or for larger ones"
        )
    return found


def _different(samples: Iterable[Sample], count: int) -> list[Sample]:
    """The first `count` different samples, or all that there seem to be."""
    found: dict[str, Sample] = {}
    in_vain = 0
    for sample in samples:
        in_vain = in_vain + 1 if sample["prompt"] in found else 0
        found.setdefault(sample["prompt"], sample)
        if len(found) == count or in_vain > _DRAWS_IN_VAIN * len(found) + _LEAST_DRAWS_IN_VAIN:
            break
    return list(found.values())


def _repeated(samples: list[Sample], rng: random.Random) -> Iterator[Sample]:
    """The samples over and over, in another order each time."""
    while True:
        rng.shuffle(samples)
        yield from samples
