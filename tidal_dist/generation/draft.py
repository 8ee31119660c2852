"""Drafts: what the next blocks will probably be, looked up in the text so far.

The model checks a draft in one pass and keeps what it would have written itself, so a draft changes how many passes a
text takes and nothing else. Prompt look-up: Saxena 2023; checking in one pass: Leviathan et al. 2023.
"""

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
    """Expects what followed when the last blocks stood in the text before.

    Attributes:
        most_context: blocks that are compared at most; those that agree with more go first.
        most_blocks: how many are proposed at a time.
    """

    most_context: int = 4
    most_blocks: int = 8

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
        self._after: dict[tuple[bytes, ...], int] = {}  # some blocks -> index of the block that followed them last
        self._beginning: dict[bytes, int] = {}  # chars of a block -> index of the last block that began so

    def add(self, block: str) -> None:
        """Take up a finished block."""
        index, written = len(self._blocks), reverse_block(block.encode())
        for count in range(1, self._settings.most_context + 1):
            if count <= index:
                self._after[tuple(self._blocks[index - count :])] = index
        for count in range(2, len(written)):
            self._beginning[written[:count]] = index
        self._blocks.append(written)

    def propose(self, written: bytes) -> list[bytes]:
        """The block at hand and some after it, each last byte first; the first begins with `written`."""
        for count in range(min(self._settings.most_context, len(self._blocks)), 0, -1):
            index = self._after.get(tuple(self._blocks[-count:]))
            if index is not None and self._blocks[index].startswith(written):
                return self._blocks[index : index + self._settings.most_blocks]
        index = self._beginning.get(written)
        return [] if index is None else self._blocks[index : index + 1]
