"""Documents -> rows of T token slots and C char slots: the row plan, from lengths alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import ShardError
from data_pipeline.layout import slot_counts

# Rows kept open while packing: a piece goes where it leaves least room. More would fill rows no better, more slowly.
_OPEN_ROWS = 64


@dataclass(frozen=True)
class DocumentLengths:
    """The lengths of the documents of one shard.

    Attributes:
        document_blocks: (d,) blocks of each document.
        prompt_blocks: (d,) its unsupervised leading blocks.
        block_tokens: (k,) tokens of each block, document after document.
        block_bytes: (k,) bytes of each block.
    """

    document_blocks: np.ndarray
    prompt_blocks: np.ndarray
    block_tokens: np.ndarray
    block_bytes: np.ndarray


@dataclass(frozen=True)
class RowPlan:
    """The rows of one shard: row i holds the pieces `row_ends[i - 1] .. row_ends[i]`.

    Attributes:
        row_ends: (rows,) running number of pieces.
        document: (pieces,) document within the shard. first_block, end_block: (pieces,) its blocks in the document.
    """

    row_ends: np.ndarray
    document: np.ndarray
    first_block: np.ndarray
    end_block: np.ndarray

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_ends)

    def pieces(self, row: int) -> Iterator[tuple[int, int, int]]:
        """(document, first block, end block) of each piece of a row."""
        start = self.row_ends[row - 1] if row else 0
        for i in range(int(start), int(self.row_ends[row])):
            yield int(self.document[i]), int(self.first_block[i]), int(self.end_block[i])


def plan_rows(lengths: DocumentLengths, row_tokens: int, row_chars: int, where: str) -> RowPlan:
    """Pack all documents of a shard into rows of `row_tokens` and `row_chars` slots.

    A document longer than a row is cut at block borders; one with a prompt keeps the end of its prompt, in at most
    half a row's tokens, before the first supervised block.

    Raises:
        ShardError: a block does not fit in a row; `where` names the shard.
    """
    pieces: list[tuple[int, int, int, int, int]] = []
    ends = np.cumsum(lengths.document_blocks, dtype=np.int64)
    for document, (n_blocks, end, t, c) in enumerate(
        zip(lengths.document_blocks.tolist(), ends.tolist(), *_document_slots(lengths, ends), strict=True)
    ):
        if t <= row_tokens and c <= row_chars:
            pieces.append((document, 0, n_blocks, t, c))
            continue
        tokens = lengths.block_tokens[end - n_blocks : end].astype(np.int64)
        sizes = lengths.block_bytes[end - n_blocks : end].astype(np.int64)
        prompt = int(lengths.prompt_blocks[document])
        if (sizes[prompt:] + 1).max() > row_chars:
            raise ShardError(
                f"{where}: document {document} has a block of {sizes[prompt:].max()} bytes, which does not fit in "
                f"data.row_chars={row_chars}; make it at least {sizes[prompt:].max() + 1}"
            )
        for first, last in _cut(tokens, sizes, prompt, row_tokens, row_chars):
            t, c = slot_counts(tokens[first:last], sizes[first:last], max(prompt - first, 0))
            pieces.append((document, first, last, t, c))
    return _pack(pieces, row_tokens, row_chars)


def _document_slots(lengths: DocumentLengths, ends: np.ndarray) -> tuple[list[int], list[int]]:
    """`slot_counts` of every whole document at once. ends: (d,) running number of blocks."""
    starts = ends - lengths.document_blocks
    tokens = np.concatenate([[0], np.cumsum(lengths.block_tokens, dtype=np.int64)])
    chars = np.concatenate([[0], np.cumsum(lengths.block_bytes + np.int64(1), dtype=np.int64)])
    t = 1 + tokens[ends - 1] - tokens[starts]
    c = chars[ends] - chars[starts + lengths.prompt_blocks]
    return t.tolist(), c.tolist()


def _cut(
    tokens: np.ndarray, sizes: np.ndarray, prompt: int, row_tokens: int, row_chars: int
) -> Iterator[tuple[int, int]]:
    """Blocks `first..end` of the pieces of a long document, greedily from its first supervised block."""
    token_ends = np.concatenate([[0], np.cumsum(tokens)])
    char_ends = np.concatenate([[0], np.cumsum(sizes + 1)])
    supervised = prompt
    first = int(np.searchsorted(token_ends, token_ends[prompt] - row_tokens // 2)) if prompt else 0
    while supervised < len(tokens):
        # Block e - 1 is the piece's last: its tokens take no slot.
        by_tokens = int(np.searchsorted(token_ends, token_ends[first] + row_tokens - 1, side="right"))
        by_chars = int(np.searchsorted(char_ends, char_ends[supervised] + row_chars, side="right")) - 1
        end = min(by_tokens, by_chars, len(tokens))
        yield first, end
        first = supervised = end


def _pack(pieces: list[tuple[int, int, int, int, int]], row_tokens: int, row_chars: int) -> RowPlan:
    """Best fit over a bounded number of open rows, in the order of the documents."""
    rows: list[list[int]] = []
    open_rows = np.zeros(_OPEN_ROWS, np.int64)
    room_t = np.full(_OPEN_ROWS, -1, np.int64)
    room_c = np.full(_OPEN_ROWS, -1, np.int64)
    for i, (_, _, _, t, c) in enumerate(pieces):
        left = (room_t - t) / row_tokens + (room_c - c) / row_chars
        left[(room_t < t) | (room_c < c)] = np.inf
        slot = int(left.argmin())
        if left[slot] == np.inf:
            slot = int((room_t / row_tokens + room_c / row_chars).argmin())
            open_rows[slot], room_t[slot], room_c[slot] = len(rows), row_tokens, row_chars
            rows.append([])
        rows[open_rows[slot]].append(i)
        room_t[slot] -= t
        room_c[slot] -= c
    order = [i for row in rows for i in row]
    table = np.array([pieces[i][:3] for i in order], dtype=np.int64).reshape(-1, 3)
    return RowPlan(
        row_ends=np.cumsum([len(row) for row in rows], dtype=np.int64),
        document=table[:, 0],
        first_block=table[:, 1],
        end_block=table[:, 2],
    )
