"""Drafts: what the next blocks will probably be, looked up in the text so far.

The model checks a draft in one pass and keeps what it would have written itself, so a draft changes how many passes a
text takes and nothing else. Prompt look-up: Saxena 2023; checking in one pass: Leviathan et al. 2023.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from data_pipeline.pieces import reverse_block


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
