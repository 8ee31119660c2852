"""Documents -> rows of T token slots and C char slots: the row plan, from lengths alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import ShardError
from data_pipeline.pieces import slot_counts

# Rows kept open while packing: a piece goes where it leaves least room. More would fill rows no better, more slowly.
_OPEN_ROWS = 64
# A piece that leaves less than this share of a row free takes the row for itself.
_FULL = 0.005


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


class PieceAddress(NamedTuple):
    """A piece of a document of a shard, as blocks of the document and as stretches of the shard's arrays."""

    document: int
    first_block: int
    end_block: int
    supervised_block: int
    block_start: int
    token_start: int
    byte_start: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class RowPlan:
    """The rows of one shard: row i holds the pieces `row_ends[i - 1] .. row_ends[i]`.

    Attributes:
        row_ends: (rows,) running number of pieces.
        document: (pieces,) document within the shard. first_block, end_block: its blocks in the document.
        supervised_block: the first of them that carries loss. block_start, token_start, byte_start: where the piece
        begins in the shard's arrays, laid end to end. tokens, bytes: how many it has. token_slots, char_slots: how
        many it takes of a row's.
    """

    row_ends: np.ndarray
    document: np.ndarray
    first_block: np.ndarray
    end_block: np.ndarray
    supervised_block: np.ndarray
    block_start: np.ndarray
    token_start: np.ndarray
    byte_start: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    token_slots: np.ndarray
    char_slots: np.ndarray

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_ends)

    def addresses(self, row: int) -> list[PieceAddress]:
        """The pieces of a row."""
        first, end = int(self.row_ends[row - 1]) if row else 0, int(self.row_ends[row])
        return [PieceAddress(*values) for values in self._table[first:end].tolist()]

    @cached_property
    def _table(self) -> np.ndarray:
        """(pieces, fields of an address), since a row is read at once."""
        return np.stack([getattr(self, name).astype(np.int64) for name in PieceAddress._fields], axis=1)

    def pieces(self, row: int) -> Iterator[tuple[int, int, int]]:
        """(document, first block, end block) of each piece of a row."""
        return ((a.document, a.first_block, a.end_block) for a in self.addresses(row))


@dataclass(frozen=True)
class _Ends:
    """Running totals of one shard: of blocks by document, of tokens and bytes by block; each begins with 0."""

    blocks: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    @classmethod
    def of(cls, lengths: DocumentLengths) -> "_Ends":
        return cls(*(_running(a) for a in (lengths.document_blocks, lengths.block_tokens, lengths.block_bytes)))

    def chars(self, block: np.ndarray) -> np.ndarray:
        """Char slots before a block if all were supervised: its bytes and a mark for each block."""
        return self.bytes[block].astype(np.int64) + block


def _running(lengths: np.ndarray) -> np.ndarray:
    total = int(lengths.sum(dtype=np.int64))
    ends = np.zeros(len(lengths) + 1, np.int32 if total < 2**31 else np.int64)
    np.cumsum(lengths, out=ends[1:], dtype=ends.dtype)
    return ends


def plan_rows(
    lengths: DocumentLengths, row_tokens: int, row_chars: int, where: str, overlap_tokens: int = 0
) -> RowPlan:
    """Pack all documents of a shard into rows of `row_tokens` and `row_chars` slots.

    A document longer than a row is cut at block borders; one with a prompt keeps the end of its prompt, in at most
    half a row's tokens, before the first supervised block; each later piece begins with up to `overlap_tokens` tokens
    of the piece before it, which carry no loss there.

    Raises:
        ShardError: a block does not fit in a row; `where` names the shard.
    """
    ends = _Ends.of(lengths)
    first, last = ends.blocks[:-1].astype(np.int64), ends.blocks[1:].astype(np.int64)
    t = 1 + ends.tokens[last - 1].astype(np.int64) - ends.tokens[first]
    c = ends.chars(last) - ends.chars(first + lengths.prompt_blocks)
    fits = (t <= row_tokens) & (c <= row_chars)
    # Columns: document, first block, first supervised block, end block, token slots, char slots.
    whole = np.stack([np.arange(len(fits)), first - first, lengths.prompt_blocks, last - first, t, c], axis=1)[fits]
    cut = [
        piece
        for document in np.flatnonzero(~fits).tolist()
        for piece in _pieces(lengths, ends, document, (row_tokens, row_chars), where, overlap_tokens)
    ]
    pieces = np.concatenate([whole, np.array(cut, np.int64).reshape(-1, 6)])
    pieces = pieces[np.lexsort((pieces[:, 1], pieces[:, 0]))]
    return _plan(pieces, ends, *_pack(pieces[:, 4], pieces[:, 5], row_tokens, row_chars))


def _pieces(
    lengths: DocumentLengths, ends: _Ends, document: int, row: tuple[int, int], where: str, overlap: int
) -> Iterator[tuple[int, int, int, int, int, int]]:
    """The pieces of a document longer than a row of `row` token and char slots."""
    start, end = ends.blocks[document : document + 2].tolist()
    tokens, sizes = (a[start:end].astype(np.int64) for a in (lengths.block_tokens, lengths.block_bytes))
    prompt = int(lengths.prompt_blocks[document])
    largest = int(sizes[prompt:].max(initial=0))
    if largest + 1 > row[1]:
        raise ShardError(
            f"{where}: document {document} has a block of {largest} bytes, which does not fit in "
            f"data.row_chars={row[1]}; make it at least {largest + 1}"
        )
    for first, supervised, last in cut_document(tokens, sizes, prompt, *row, overlap):
        t, c = slot_counts(tokens[first:last], sizes[first:last], supervised - first)
        yield document, first, supervised, last, t, c


def cut_document(
    tokens: np.ndarray, sizes: np.ndarray, prompt: int, row_tokens: int, row_chars: int, overlap: int
) -> Iterator[tuple[int, int, int]]:
    """The pieces of a document longer than a row, greedily from its first supervised block.

    Args:
        tokens, sizes: tokens and bytes of each block. prompt: unsupervised leading blocks. overlap: as in `plan_rows`.

    Yields:
        (first, first supervised, end) block of each piece.
    """
    token_ends = np.concatenate([[0], np.cumsum(tokens)])
    char_ends = np.concatenate([[0], np.cumsum(sizes + 1)])
    supervised, context = prompt, row_tokens // 2
    while supervised < len(tokens):
        first = int(np.searchsorted(token_ends, token_ends[supervised] - context)) if supervised else 0
        # Block e - 1 is the piece's last: its tokens take no slot.
        by_tokens = int(np.searchsorted(token_ends, token_ends[first] + row_tokens - 1, side="right"))
        by_chars = int(np.searchsorted(char_ends, char_ends[supervised] + row_chars, side="right")) - 1
        end = min(by_tokens, by_chars, len(tokens))
        yield first, supervised, end
        supervised, context = end, min(overlap, row_tokens // 2)


def _pack(t: np.ndarray, c: np.ndarray, row_tokens: int, row_chars: int) -> tuple[np.ndarray, np.ndarray]:
    """Best fit over a bounded number of open rows, in the order of the pieces.

    Args:
        t, c: (n,) slots of each piece.

    Returns:
        order: (n,) the pieces, row after row. row_ends: running number of pieces.
    """
    rows: list[list[int]] = []
    shares_t, shares_c = t / row_tokens, c / row_chars
    full = (np.maximum(shares_t, shares_c) > 1 - _FULL).tolist()
    open_rows = np.zeros(_OPEN_ROWS, np.int64)
    # Free shares of the open rows; the unused places are full.
    room_t, room_c = np.full(_OPEN_ROWS, -1.0), np.full(_OPEN_ROWS, -1.0)
    slack = 0.5 / max(row_tokens, row_chars)  # shares are sums of many fractions
    for i, (share_t, share_c) in enumerate(zip(shares_t.tolist(), shares_c.tolist(), strict=True)):
        if full[i]:
            rows.append([i])
            continue
        left_t, left_c = room_t - share_t, room_c - share_c
        left = np.where((left_t < -slack) | (left_c < -slack), np.inf, left_t + left_c)
        slot = int(left.argmin())
        if left[slot] == np.inf:
            slot = int((room_t + room_c).argmin())
            open_rows[slot], room_t[slot], room_c[slot] = len(rows), 1.0, 1.0
            rows.append([])
        rows[open_rows[slot]].append(i)
        room_t[slot] -= share_t
        room_c[slot] -= share_c
    order = np.array([i for row in rows for i in row], np.int64)
    return order, np.cumsum([len(row) for row in rows], dtype=np.int64)


def _plan(pieces: np.ndarray, ends: _Ends, order: np.ndarray, row_ends: np.ndarray) -> RowPlan:
    """The plan of packed pieces (columns as in `plan_rows`)."""
    document, first, supervised, end, token_slots, char_slots = pieces[order].T
    start = ends.blocks[document].astype(np.int64)
    begins, stops = start + first, start + end
    columns = {
        "document": document,
        "first_block": first,
        "end_block": end,
        "supervised_block": supervised,
        "block_start": begins,
        "token_start": ends.tokens[begins],
        "byte_start": ends.bytes[begins],
        "tokens": ends.tokens[stops] - ends.tokens[begins],
        "bytes": ends.bytes[stops] - ends.bytes[begins],
        "token_slots": token_slots,
        "char_slots": char_slots,
    }
    return RowPlan(row_ends=row_ends, **{name: _compact(array) for name, array in columns.items()})


def batches_alike(slots: Sequence[tuple[int, int]], most: int) -> Iterator[list[int]]:
    """The numbers of rows, those of like lengths together.

    Args:
        slots: token and char slots of each row. most: of a batch, where all its rows are as long as the longest; a row
            that has more is a batch.
    """
    batch: list[int] = []
    widest = (0, 0)
    for i in sorted(range(len(slots)), key=lambda i: slots[i]):
        wider = max(widest[0], slots[i][0]), max(widest[1], slots[i][1])
        if batch and sum(wider) * (len(batch) + 1) > most:
            yield batch
            batch, wider = [], slots[i]
        batch.append(i)
        widest = wider
    if batch:
        yield batch


def _compact(array: np.ndarray) -> np.ndarray:
    return array.astype(np.min_scalar_type(int(array.max(initial=0))))
