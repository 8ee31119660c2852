"""Drafts: what the next blocks will probably be, looked up in the text so far, or what the model itself expects next.

The model checks a draft in one pass and keeps what it would have written itself, so a draft changes how many passes a
text takes and nothing else. Prompt look-up: Saxena 2023; checking in one pass: Leviathan et al. 2023.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from data_pipeline.errors import UserError
from data_pipeline.pieces import reverse_block
from tidal_dist.config import ModelConfig


class Drafter(Protocol):
    """The drafts of one sequence."""

    def propose(self, written: bytes) -> list[bytes]:
        """The block at hand and some after it, each last byte first; the first begins with `written`."""

    def add(self, block: str) -> None:
        """Take up a finished block."""


class Draft(Protocol):
    """A way to draft."""

    def begin(self, blocks: Sequence[str]) -> Drafter:
        """Drafts for a sequence whose prompt has these blocks."""


@dataclass(frozen=True)
class LookUp:
    """Expects what followed when the last blocks stood in the text before, or else when a block began as this one.

    Attributes:
        most_context: blocks that are compared at most; those that agree with more go first.
        most_blocks: how many are proposed at a time.
        most_places: where the same blocks stood in the text before: so many are remembered, the last goes first.
    """

    most_context: int = 4
    most_blocks: int = 8
    most_places: int = 16

    def begin(self, blocks: Sequence[str]) -> "_LookUp":
        """Drafts for a sequence whose prompt has these blocks."""
        drafter = _LookUp(self)
        for block in blocks:
            drafter.add(block)
        return drafter


class _LookUp:
    def __init__(self, settings: LookUp):
        self._settings = settings
        self._blocks: list[bytes] = []  # last byte first
        # Some blocks -> indices of the blocks that followed them.
        self._after: dict[tuple[bytes, ...], deque[int]] = defaultdict(lambda: deque(maxlen=settings.most_places))
        self._beginning: dict[bytes, int] = {}  # chars of a block -> index of the last block that began so

    def add(self, block: str) -> None:
        """Take up a finished block."""
        index, written = len(self._blocks), reverse_block(block.encode())
        for count in range(1, min(self._settings.most_context, index) + 1):
            self._after[tuple(self._blocks[index - count :])].append(index)
        for count in range(1, len(written)):
            self._beginning[written[:count]] = index
        self._blocks.append(written)

    def propose(self, written: bytes) -> list[bytes]:
        """The block at hand and some after it, each last byte first; the first begins with `written`."""
        index = self._place(written)
        return [] if index is None else self._blocks[index : index + self._settings.most_blocks]

    def _place(self, written: bytes) -> int | None:
        for count in range(min(self._settings.most_context, len(self._blocks)), 0, -1):
            for index in reversed(self._after.get(tuple(self._blocks[-count:]), ())):
                if self._blocks[index].startswith(written):
                    return index
        return self._beginning.get(written)


@dataclass(frozen=True)
class ByModel:
    """Expects what the model's draft head says of the block at hand; see drafting.py."""

    def begin(self, blocks: Sequence[str]) -> "Expected":
        """Drafts for a sequence whose prompt has these blocks."""
        del blocks
        return Expected()

    @staticmethod
    def check(config: ModelConfig) -> None:
        """See that a model can draft.

        Raises:
            UserError: it has no draft head.
        """
        if config.draft_layers is None:
            raise UserError(
                "draft model: this model has no draft head; train one with model.draft_layers, or use draft lookup"
            )


class Expected:
    """A drafter that is told what to expect of the block at hand.

    Attributes:
        block: that, its last byte first. is_whole: it is expected to end there.
    """

    def __init__(self) -> None:
        self.block, self.is_whole = b"", False

    def begun_with(self, written: bytes) -> bytes:
        """What is expected of a block that begins with `written`: no more than this, where something else was."""
        if not self.block.startswith(written):
            self.block, self.is_whole = written, False
        return self.block

    def expect(self, id_: int) -> None:
        """Expect a byte more, or the end."""
        if id_ < 256:
            self.block += bytes([id_])
        else:
            self.is_whole = True

    def add(self, block: str) -> None:
        """Take up a finished block."""
        del block
        self.block, self.is_whole = b"", False

    def propose(self, written: bytes) -> list[bytes]:
        """The block at hand, if it is expected to begin with `written`."""
        return [self.block] if self.block.startswith(written) else []


DRAFTS: dict[str, Callable[[], Draft]] = {"lookup": LookUp, "model": ByModel}


def draft_named(name: str | None, config: ModelConfig) -> Draft | None:
    """The way to draft that has this name, for a model; none for None.

    Raises:
        UserError: there is none, or the model has no draft head.
    """
    if name is None:
        return None
    if name not in DRAFTS:
        raise UserError(f"draft {name}: choose from {', '.join(DRAFTS)}")
    draft = DRAFTS[name]()
    if isinstance(draft, ByModel):
        draft.check(config)
    return draft
