"""The demo's corpus: signed sums and differences of up to four digits as JSON lines of `prompt` and `answer`.

`python -m data_pipeline.arithmetic OUT.jsonl --count N`. One problem in fifty, chosen by its hash, is kept for
testing and never written.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from itertools import islice, repeat
from pathlib import Path

from data_pipeline.files import whole_file

MAX_DIGITS = 4
_HELD_OUT_SHARE = 50
_NEGATIVE_SHARE = 0.2
# Long operands weigh more: there are more of them, and their sums are learned last.
_TRAINING_WEIGHTS = (1, 2, 3, 4)
# Two random numbers hardly ever cancel, so training sees some that do.
_NEAR_SHARE = 0.05


def is_held_out(prompt: str) -> bool:
    """Whether a problem is kept for testing: it never occurs in training."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) % _HELD_OUT_SHARE == 0


def problems(seed: str, digit_weights: Sequence[float]) -> Iterator[tuple[str, str]]:
    """An endless stream of (prompt, answer); each operand has n digits with probability ~ digit_weights[n - 1]."""
    rng = random.Random(seed)
    lengths = range(1, MAX_DIGITS + 1)
    while True:
        a, b = (_operand(rng, digits) for digits in rng.choices(lengths, digit_weights, k=2))
        yield _problem(a, b, rng.choice("+-"))


def _problem(a: int, b: int, sign: str) -> tuple[str, str]:
    return f"{a} {sign} {b} =", f" {a + b if sign == '+' else a - b}"


def _near_problems(seed: str) -> Iterator[tuple[str, str]]:
    """An endless stream of problems whose leading digits cancel: 5000 - 4999, -71 + 73."""
    rng = random.Random(seed)
    while True:
        a = _operand(rng, rng.randint(1, MAX_DIGITS))
        b = a + rng.randint(-99, 99)
        if abs(b) < 10**MAX_DIGITS:
            yield _problem(a, b, "-") if rng.random() < 0.5 else _problem(a, -b, "+")


def _operand(rng: random.Random, digits: int) -> int:
    magnitude = rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)
    return -magnitude if rng.random() < _NEGATIVE_SHARE else magnitude


def training_problems(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """`count` problems, none of them held out; some occur more than once."""
    rng = random.Random(f"mix {seed}")
    any_pair, near_pair = problems(f"training {seed}", _TRAINING_WEIGHTS), _near_problems(f"near {seed}")
    stream = (next(near_pair if rng.random() < _NEAR_SHARE else any_pair) for _ in repeat(None))
    return islice((p for p in stream if not is_held_out(p[0])), count)


def held_out_problems(count: int, seed: int, digits: int | None = None) -> list[tuple[str, str]]:
    """`count` different problems that never occur in training, operands of `digits` digits or of 1 to 4, evenly.

    Raises:
        ValueError: there are not so many.
    """
    weights = [digits is None or n == digits for n in range(1, MAX_DIGITS + 1)]
    stream = problems(f"held out {seed}", weights)
    found = {prompt: answer for prompt, answer in islice(stream, 200 * count) if is_held_out(prompt)}
    if len(found) < count:
        raise ValueError(f"found {len(found)} held-out problems of {digits} digits, not {count}")
    return list(found.items())[:count]


def write_corpus(path: Path, count: int, seed: int) -> None:
    """Write `count` training problems as JSON lines, whole or not at all."""
    with whole_file(path) as file:
        for prompt, answer in training_problems(count, seed):
            file.write((json.dumps({"prompt": prompt, "answer": answer}) + "\n").encode())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    write_corpus(arguments.out, arguments.count, arguments.seed)


if __name__ == "__main__":
    main()
