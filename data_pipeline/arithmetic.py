"""The demo's corpus: sums and differences as JSON lines of `prompt` and `answer`.

`python -m data_pipeline.arithmetic OUT.jsonl --count N`. One problem in fifty, chosen by its hash, is kept for
testing and never written.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.files import whole_file

MAX_DIGITS = 4
_HELD_OUT_SHARE = 50
_NEGATIVE_SHARE = 0.2


def is_held_out(prompt: str) -> bool:
    """Whether a problem is kept for testing: it never occurs in training."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) % _HELD_OUT_SHARE == 0


def problems(seed: str, digits: int | None = None) -> Iterator[tuple[str, str]]:
    """An endless stream of (prompt, answer), both operands of `digits` digits or of 1 to 4, evenly."""
    rng = random.Random(seed)
    while True:
        a, b = (_operand(rng, digits or rng.randint(1, MAX_DIGITS)) for _ in range(2))
        sign = rng.choice("+-")
        yield f"{a} {sign} {b} =", f" {a + b if sign == '+' else a - b}"


def _operand(rng: random.Random, digits: int) -> int:
    magnitude = rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)
    return -magnitude if rng.random() < _NEGATIVE_SHARE else magnitude


def training_problems(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """`count` problems, none of them a test problem; some occur more than once."""
    stream = (p for p in problems(f"training {seed}") if not is_held_out(p[0]))
    return (next(stream) for _ in range(count))


def held_out_problems(count: int, seed: int, digits: int | None = None) -> list[tuple[str, str]]:
    """`count` different problems that never occur in training."""
    found: dict[str, str] = {}
    for prompt, answer in problems(f"held out {seed}", digits):
        if is_held_out(prompt):
            found[prompt] = answer
        if len(found) == count:
            break
    return list(found.items())


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
