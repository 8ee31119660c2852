"""What a model says of a text."""

import math
from dataclasses import dataclass
from functools import cached_property

from data_pipeline.pieces import reverse_block
from data_pipeline.tokenizer import EOB
from tidal_dist.generation.events import Char
from tidal_dist.model.likelihood import bits_per_byte


@dataclass(frozen=True)
class BlockScore:
    """What a model says of one block.

    Attributes:
        logprobs: nats of each char, from the block's end to its start, and of the end mark.
        end: that mark; `EOB` where either would do.
        alternatives: for each of them, where asked for, the likeliest ids with their nats.
    """

    text: str
    logprobs: tuple[float, ...]
    end: int = EOB
    alternatives: tuple[tuple[tuple[int, float], ...], ...] = ()

    @property
    def chars(self) -> tuple[Char, ...]:
        """As if they had been generated."""
        ids = (*reverse_block(self.text.encode()), self.end)
        alternatives = self.alternatives or [()] * len(ids)
        return tuple(map(Char, ids, self.logprobs, alternatives))

    @property
    def logprob(self) -> float:
        """Nats of the block, its end mark included."""
        return math.fsum(self.logprobs)


@dataclass(frozen=True)
class Score:
    """What a model says of a text after a context.

    Attributes:
        blocks: of the text, in reading order.
        is_greedy: greedy decoding, held to well-formed UTF-8 as ever, would write just these blocks.
    """

    blocks: tuple[BlockScore, ...]
    is_greedy: bool

    @cached_property
    def logprob(self) -> float:
        """Nats of the text, all end marks included."""
        return math.fsum(block.logprob for block in self.blocks)

    @cached_property
    def bytes(self) -> int:
        """Bytes of the text."""
        return sum(len(block.text.encode()) for block in self.blocks)

    @property
    def bits_per_byte(self) -> float:
        """As validation reports it: end marks count, and are no bytes."""
        return bits_per_byte(-self.logprob, self.bytes)
