"""Which chars would repeat a block of the text so far."""

from collections.abc import Iterable

from data_pipeline.pieces import reverse_block
from data_pipeline.tokenizer import EOB, EOS


class WrittenBlocks:
    """What follows, in blocks that were written before, behind the chars of the block at hand."""

    def __init__(self, blocks: Iterable[str] = ()):
        self._next: dict[bytes, set[int]] = {}
        for block in blocks:
            self.add(block)

    def add(self, block: str) -> None:
        """Take up a finished block."""
        written = reverse_block(block.encode())
        for n, byte in enumerate(written):
            self._next.setdefault(written[:n], set()).add(byte)
        self._next.setdefault(written, set()).update((EOB, EOS))

    def next_ids(self, written: bytes) -> set[int]:
        """Ids with which the chars `written`, last byte of the block first, go on as an earlier block did."""
        return self._next.get(written, set())
