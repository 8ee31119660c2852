"""What is asked of a generation."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from data_pipeline.errors import UserError
from tidal_dist.generation.sampling import GREEDY, Sampling


@dataclass(frozen=True)
class Limits:
    """Where a generation ends, beside `<eos>`.

    Attributes:
        max_bytes: a block with which the text would exceed them is dropped. max_blocks: after so many.
        stop: the text ends before the first of these.
    """

    max_bytes: int = 256
    max_blocks: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise UserError(f"max_bytes {self.max_bytes}: must be at least 1")
        if "" in self.stop:
            raise UserError("stop: an empty string would stop every text at once; leave it out")


DEFAULT_LIMITS = Limits()


class Constraint(Protocol):
    """What the text must be: says, char by char from a block's end, which ids may come."""

    def start(self) -> Any:
        """The state before the first block."""

    def allowed(self, state: Any, written: bytes, room: int) -> np.ndarray:
        """Which ids may follow in the block at hand, (V,) bool.

        Args:
            state: before the block. written: the block's bytes so far, its last byte first. room: bytes left in it.
        """

    def after(self, state: Any, block: bytes) -> Any:
        """The state behind a finished block, whose bytes come in reading order."""


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
        prompt: a text, or the blocks of one that is already segmented.
        alternatives: how many of the likeliest ids are reported with each char.
    """

    prompt: str | Sequence[str]
    sampling: Sampling = GREEDY
    limits: Limits = DEFAULT_LIMITS
    constraint: Constraint | None = None
    alternatives: int = 0


def requests_of(prompts: Iterable[str | Sequence[str]], like: Request) -> Iterator[Request]:
    """A request like another for each prompt; prompt i samples with that one's seed + i."""
    for i, prompt in enumerate(prompts):
        yield replace(like, prompt=prompt, sampling=replace(like.sampling, seed=like.sampling.seed + i))
