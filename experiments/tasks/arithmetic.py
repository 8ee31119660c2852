"""Sums, differences, sums of many numbers, products: `12 + 34 =` -> ` 46`.

Training draws numbers of mixed or of one length; a test has operands of exactly so many digits, also far beyond what
training has seen. One problem in ten, by its hash, is kept for tests.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from math import prod

from pydantic import Field, model_validator

from experiments.tasks.problems import ProblemOptions, Problems, Stream, corpus_of
from experiments.tasks.writing import ComposedTask, Corpus, Sample, is_tested

Lengths = Mapping[int, float]  # number of digits -> weight

_MOST_DIGITS = 1000


class DigitOptions(ProblemOptions):
    """How long the numbers are. Each operand's length is drawn for itself."""

    max_digits: int | None = Field(None, ge=1, le=_MOST_DIGITS, description="operands of 1 to so many digits")
    digits: int | None = Field(None, ge=1, le=_MOST_DIGITS, description="operands of exactly so many digits")
    digit_weights: list[float] | None = Field(
        None, description="of 1, 2, ... max_digits digits; none: a length weighs as much as it is long"
    )
    test_digits: list[int] = Field(min_length=1, description="a test each, whose operands have exactly so many digits")

    @model_validator(mode="after")
    def _consistent(self) -> "DigitOptions":
        if (self.max_digits is None) == (self.digits is None):
            raise ValueError("give either max_digits or digits")
        if any(not 1 <= n <= _MOST_DIGITS for n in self.test_digits):
            raise ValueError(f"test_digits must be from 1 to {_MOST_DIGITS}")
        weights = self.digit_weights
        if weights is not None and len(weights) != self.max_digits:
            raise ValueError("digit_weights needs as many weights as max_digits says")
        if weights is not None and (min(weights) < 0 or sum(weights) <= 0):
            raise ValueError("digit_weights must not be negative, nor all of them 0")
        return self

    @property
    def lengths(self) -> Lengths:
        """Weights of the lengths that training has."""
        if self.digits is not None:
            return {self.digits: 1.0}
        lengths = range(1, (self.max_digits or 0) + 1)
        return dict(zip(lengths, self.digit_weights or lengths, strict=True))


class ManyOperandsOptions(DigitOptions):
    """Sums of several numbers."""

    operands: list[int] = Field([3, 4], min_length=1, description="how many numbers a sum may have; a test each")

    @model_validator(mode="after")
    def _enough(self) -> "ManyOperandsOptions":
        if min(self.operands) < 2:
            raise ValueError("operands must be 2 or more")
        return self


class MultiplicationOptions(DigitOptions):
    """Products; the lengths are those of the first factor."""

    factor_digits: int = Field(1, ge=1, le=_MOST_DIGITS, description="the second factor has 1 to so many; a test each")


def _sums(options: DigitOptions, seed: int) -> Corpus:
    problems = Problems(
        _trained(_additions(options.lengths, [2])),
        {_digits(n): _tested(_additions({n: 1}, [2])) for n in options.test_digits},
    )
    return corpus_of("sums", problems, options, seed)


def _many_operands(options: ManyOperandsOptions, seed: int) -> Corpus:
    tests = {
        f"operands-{k}-{_digits(n)}": _tested(_additions({n: 1}, [k]))
        for k in options.operands
        for n in options.test_digits
    }
    problems = Problems(_trained(_additions(options.lengths, options.operands)), tests)
    return corpus_of("many_operands", problems, options, seed)


def _differences(options: DigitOptions, seed: int) -> Corpus:
    problems = Problems(
        _trained(_subtractions(options.lengths)),
        {_digits(n): _tested(_subtractions({n: 1})) for n in options.test_digits},
    )
    return corpus_of("differences", problems, options, seed)


def _multiplication(options: MultiplicationOptions, seed: int) -> Corpus:
    factors = range(1, options.factor_digits + 1)
    tests = {
        f"factor-{k}-{_digits(n)}": _tested(_products({n: 1}, {k: 1})) for k in factors for n in options.test_digits
    }
    problems = Problems(_trained(_products(options.lengths, dict.fromkeys(factors, 1.0))), tests)
    return corpus_of("multiplication", problems, options, seed)


def _additions(lengths: Lengths, operands: Sequence[int]) -> Stream:
    def stream(rng: random.Random) -> Iterator[Sample]:
        while True:
            numbers = [_number(rng, lengths) for _ in range(rng.choice(operands))]
            yield _sample("+", numbers, sum(numbers))

    return stream


def _subtractions(lengths: Lengths) -> Stream:
    def stream(rng: random.Random) -> Iterator[Sample]:
        while True:
            numbers = [_number(rng, lengths) for _ in range(2)]
            yield _sample("-", numbers, numbers[0] - numbers[1])

    return stream


def _products(lengths: Lengths, factors: Lengths) -> Stream:
    def stream(rng: random.Random) -> Iterator[Sample]:
        while True:
            numbers = [_number(rng, lengths), _number(rng, factors)]
            yield _sample("*", numbers, prod(numbers))

    return stream


def _number(rng: random.Random, lengths: Lengths) -> int:
    (digits,) = rng.choices(list(lengths), list(lengths.values()))
    return rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


def _sample(sign: str, numbers: Sequence[int], answer: int) -> Sample:
    return {"prompt": f" {sign} ".join(map(str, numbers)) + " =", "answer": f" {answer}"}


def _trained(problems: Stream) -> Stream:
    return lambda rng: (s for s in problems(rng) if not is_tested(s["prompt"]))


def _tested(problems: Stream) -> Stream:
    return lambda rng: (s for s in problems(rng) if is_tested(s["prompt"]))


def _digits(n: int) -> str:
    return f"digits-{n}"


SUMS = ComposedTask("sums", DigitOptions, _sums)
DIFFERENCES = ComposedTask("differences", DigitOptions, _differences)
MANY_OPERANDS = ComposedTask("many_operands", ManyOperandsOptions, _many_operands)
MULTIPLICATION = ComposedTask("multiplication", MultiplicationOptions, _multiplication)
