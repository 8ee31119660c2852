"""Texts -> encoded blocks, many documents at a time and no Python per block.

What comes out is what `pieces.piece_of_text` gives for each document. It is fast because texts are cut over arrays
(`boundaries`), and because blocks repeat: each different one is encoded once and looked up from then on.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.block_table import BlockTable
from data_pipeline.boundaries import parts_in_blocks
from data_pipeline.tokenizer import MixedTokenizer

# Text that is cut and encoded at a time. The arrays made of it take 30 times as much, or 100 where blocks are short.
_PART_BYTES = 1 << 19
# Room for two million blocks, about.
_DICTIONARY_BYTES = 128 << 20
_BATCH_BLOCKS = 1000


@dataclass(frozen=True)
class EncodedDocuments:
    """The blocks of d documents, end to end: k blocks, m bytes, n tokens.

    Attributes:
        chars: (m,) uint8, every block's bytes reversed within the block.
        tokens: (n,) int32, token ids.
        block_tokens: (k,) uint8, tokens of each block.
        block_bytes: (k,) uint8, bytes of each block.
        document_blocks: (d,) uint32, blocks of each document, its prompt's included.
        prompt_blocks: (d,) uint32, its leading blocks that are the prompt.
    """

    chars: np.ndarray
    tokens: np.ndarray
    block_tokens: np.ndarray
    block_bytes: np.ndarray
    document_blocks: np.ndarray
    prompt_blocks: np.ndarray

    @property
    def one_token_blocks(self) -> int:
        """How many blocks are a single token."""
        return int(np.count_nonzero(self.block_tokens == 1))


class BatchEncoder:
    """Encodes batches of documents. It keeps the encodings of blocks from batch to batch, within bounds."""

    def __init__(
        self, tokenizer: MixedTokenizer, part_bytes: int = _PART_BYTES, dictionary_bytes: int = _DICTIONARY_BYTES
    ):
        """Encode with `tokenizer`.

        Args:
            tokenizer: its segmentation cuts the texts.
            part_bytes: text that is worked on at a time: a longer one is cut, so that memory stays bounded.
            dictionary_bytes: memory of the known blocks, about; when it is full, they are forgotten.
        """
        self._segmentation = tokenizer.segmentation
        self._part_bytes = part_bytes
        self._known = _KnownBlocks(tokenizer, dictionary_bytes)

    def encode(self, prompts: Sequence[str], texts: Sequence[str]) -> EncodedDocuments:
        """Encode documents; each is a prompt, which may be empty, and the text after it.

        Raises:
            TokenizerError: the tokeniser changes the text of a block.
        """
        encoded = [text.encode() for pair in zip(prompts, texts, strict=True) for text in pair]
        borders = np.cumsum([0, *map(len, encoded)])  # of the prompts and texts, in bytes
        data = b"".join(encoded)
        del encoded
        chars = np.empty(len(data), np.uint8)
        # Unlike a list of parts that is joined at the end, these never hold everything twice.
        tokens, block_tokens, block_bytes = bytearray(), bytearray(), bytearray()
        blocks_before = np.zeros(len(borders), np.int64)
        start = 0
        for part, starts in parts_in_blocks(data, borders[:-1], self._segmentation, self._part_bytes):
            end = start + len(part)
            low, high = np.searchsorted(borders, [start, end])
            blocks_before[low:high] = len(block_bytes) + np.searchsorted(starts, borders[low:high] - start)
            sizes = np.diff(starts, append=len(part))
            chars[start:end] = _reversed_blocks(part, starts, sizes)
            ids, counts = self._known.encode(part, starts)
            tokens += ids.data
            block_tokens += counts.data
            block_bytes += sizes.astype(np.uint8).data
            start = end
        blocks_before[np.searchsorted(borders, start) :] = len(block_bytes)
        blocks = np.diff(blocks_before).reshape(-1, 2).astype(np.uint32)
        return EncodedDocuments(
            chars=chars,
            tokens=np.frombuffer(tokens, np.int32),
            block_tokens=np.frombuffer(block_tokens, np.uint8),
            block_bytes=np.frombuffer(block_bytes, np.uint8),
            document_blocks=blocks.sum(1, np.uint32),
            prompt_blocks=blocks[:, 0].copy(),
        )


class _KnownBlocks:
    """Blocks and their token ids: those of the block with number i are ids[first[i] : first[i] + count[i]]."""

    def __init__(self, tokenizer: MixedTokenizer, max_bytes: int):
        self._tokenizer = tokenizer
        self._max_bytes = max_bytes
        self._forget()

    def _forget(self) -> None:
        self._table = BlockTable()
        self._ids, self._first, self._count = array("i"), array("q", [0]), array("B", [0])

    @property
    def nbytes(self) -> int:
        """Memory of what is known."""
        return self._table.nbytes + 9 * len(self._first) + 4 * len(self._ids)

    def encode(self, data: bytes, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (n,) int32, and tokens of each block (k,) uint8, of the blocks of `data` from `starts` on."""
        if self.nbytes > self._max_bytes:
            self._forget()
        numbers = self._table.find(data, starts)
        unknown = np.flatnonzero(numbers == 0)
        if len(unknown):
            ends = np.append(starts[1:], len(data))
            pairs = zip(starts[unknown].tolist(), ends[unknown].tolist(), strict=True)
            numbers[unknown] = self._learn([data[start:end] for start, end in pairs])
        counts = np.frombuffer(self._count, np.uint8).take(numbers)
        places = _runs(np.frombuffer(self._first, np.int64).take(numbers), counts, 1)
        return np.frombuffer(self._ids, np.int32).take(places), counts

    def _learn(self, blocks: list[bytes]) -> list[int]:
        """Encode and add what is different among unknown blocks; the number of each."""
        numbers = {block: len(self._first) + i for i, block in enumerate(dict.fromkeys(blocks))}
        new = list(numbers)
        for i in range(0, len(new), _BATCH_BLOCKS):
            batch = new[i : i + _BATCH_BLOCKS]
            ids, counts = self._tokenizer.encode_blocks([block.decode() for block in batch])
            sizes = np.array([len(block) for block in batch])
            self._table.add(b"".join(batch), np.cumsum(sizes) - sizes)
            self._first.frombytes((len(self._ids) + np.cumsum(counts) - counts).tobytes())
            self._count.frombytes(counts.astype(np.uint8).tobytes())
            self._ids.frombytes(ids.tobytes())
        return [numbers[block] for block in blocks]


def _reversed_blocks(data: bytes, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(m,) uint8: the bytes of `data`, turned round within each block."""
    return np.frombuffer(data, np.uint8).take(_runs(starts + sizes - 1, sizes, -1))


def _runs(first: np.ndarray, counts: np.ndarray, step: int) -> np.ndarray:
    """first[0], first[0] + step, ..., counts[0] of them, then those of first[1], ...; no count is 0."""
    # The sums of their differences: faster than repeating first[i].
    ends = np.cumsum(counts, dtype=np.int64)
    last = first + step * (counts.astype(np.int64) - 1)
    runs = np.full(int(ends[-1]), step, np.int64)
    runs[ends - counts] = first - np.append(0, last[:-1])
    return np.cumsum(runs, out=runs)
