"""What comes of a generation: chars, blocks, text that may be shown, and the whole."""

from dataclasses import dataclass, field
from typing import Any

from data_pipeline.tokenizer import char_name


@dataclass(frozen=True, slots=True)
class Char:
    """A char as it was chosen.

    Attributes:
        id: 0..255 a byte, or one of the end marks `EOB` and `EOS`.
        logprob: nats, by the model's own distribution: at temperature 1, nothing excluded.
        alternatives: the likeliest ids by that distribution with their logprobs, likeliest first.
    """

    id: int
    logprob: float = field(compare=False)
    alternatives: tuple[tuple[int, float], ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        """As people read it: a byte, or `<eob>` and `<eos>`."""
        return char_name(self.id)


@dataclass(frozen=True)
class Block:
    """A finished block.

    Attributes:
        chars: as generated, from the block's end to its start, the end mark last.
        tokens: the ids it became. token_names: for people. start_pos: tokens before it.
        char_positions: of the chars that were fed for them: `<bob>` and all bytes.
    """

    text: str
    chars: tuple[Char, ...]
    tokens: tuple[int, ...]
    token_names: tuple[str, ...]
    start_pos: int
    char_positions: tuple[int, ...]

    @property
    def logprob(self) -> float:
        """Nats of the whole block, its end mark included."""
        return sum(char.logprob for char in self.chars)

    def as_trace(self) -> dict[str, Any]:
        """How it was written, for a report."""
        return {
            "chars": [char.name for char in self.chars[:-1]],
            "block": self.text,
            "end": self.chars[-1].name,
            "tokens": list(self.token_names),
            "char_positions": list(self.char_positions),
            "token_positions": list(range(self.start_pos, self.start_pos + len(self.tokens))),
            "logprobs": [round(char.logprob, 4) for char in self.chars],
        }


@dataclass(frozen=True)
class Text:
    """A piece of the final text: nothing that comes later takes it back, no stop string either."""

    text: str


Event = Char | Block | Text


@dataclass
class Generation:
    """What was generated after one prompt.

    Attributes:
        text: the continuation, up to a stop string. details: its blocks, the one with the stop string whole.
        finish: "eos", "length", "stop" or "cancelled".
        off_canonical_joins: borders that segmenting the blocks' text anew would not set or would add.
        ill_formed_blocks: blocks that would have come out ill-formed if the likeliest id were taken without a mask.
        passes: of the model, for this sequence. drafted: chars that were proposed to it. accepted: those it took.
        draft_passes: of the model's draft head, beside `passes`.
    """

    text: str = ""
    details: list[Block] = field(default_factory=list)
    finish: str = "length"
    off_canonical_joins: int = 0
    ill_formed_blocks: int = 0
    passes: int = field(default=0, compare=False)
    drafted: int = field(default=0, compare=False)
    accepted: int = field(default=0, compare=False)
    draft_passes: int = field(default=0, compare=False)

    @property
    def blocks(self) -> list[str]:
        """The blocks' texts."""
        return [block.text for block in self.details]

    @property
    def trace(self) -> list[dict[str, Any]]:
        """How each block was written."""
        return [block.as_trace() for block in self.details]

    @property
    def logprob(self) -> float:
        """Nats of all blocks, end marks included."""
        return sum(block.logprob for block in self.details)
