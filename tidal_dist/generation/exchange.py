"""What a sequence gives to a pass of the model, and what it gets from it.

B sequences of a pass, t tokens and n chars of one, C char slots of each, V ids of the output vocabulary, F arrays of
`Slots`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

CharInput = tuple[int, int, int, int]  # id, c, block, start_pos


@dataclass(frozen=True)
class Feed:
    """What a sequence gives to a pass: tokens (t, F), and its next char with those that are drafted behind it.

    Attributes:
        tokens: the arrays of their `Slots`, side by side.
        drafted_tokens: of the tokens, how many belong to each block that is not written yet.
    """

    tokens: np.ndarray | None
    chars: list[CharInput]
    drafted_tokens: list[int] = field(default_factory=list)

    @property
    def slots(self) -> int:
        """How many it takes."""
        return len(self.chars) + (0 if self.tokens is None else len(self.tokens))


@dataclass(frozen=True)
class Answer:
    """What the model says to n chars of a sequence: logits (n, V), and for each the likeliest id and the log of the sum
    of the logits' exponentials."""

    logits: np.ndarray
    likeliest: list[int]
    totals: list[float]


def answers(logits: np.ndarray) -> Iterator[Answer]:
    """The answers to the sequences of a pass, by logits (B, C, V), all at once: rows are many and short."""
    highest = logits.max(axis=-1, keepdims=True)
    totals = highest[..., 0] + np.log(np.exp(logits - highest).sum(axis=-1))
    return map(Answer, logits, logits.argmax(axis=-1).tolist(), totals.tolist())
