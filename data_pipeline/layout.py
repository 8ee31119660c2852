"""THE definition of the two streams: tokens, chars, labels, positions, places, and who sees whom.

Training, decoding, masks, checks and plots call these functions; nobody else computes a position, a label or a mask.
They are written with operators that numpy arrays and torch tensors share.

A document is two streams. The token stream holds `<bos>` and the tokens of all blocks but the last (nothing ever
reads those). The char stream holds one run per supervised block: `<bob>` and the block's bytes from its end to its
start; the labels of a run are the same bytes followed by `<eob>`, or by `<eos>` after the document's last block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from data_pipeline.pieces import Piece
from data_pipeline.tokenizer import BOB, BOS, EOB, EOS, PAD

CharPositions = Literal["mirrored", "forward"]
TokenAttention = Literal["block", "causal"]
IGNORED = -100  # the label of a slot that carries no loss
NO_PLACE = 0  # the place of <bos> and of padding
NO_DOCUMENT = 0  # the document of padding; packed documents count from 1


def char_position(start_pos: Any, c: Any, char_positions: CharPositions) -> Any:
    """Position of char `c` (`<bob>` has c = 0) of the block with `start_pos` tokens before it."""
    return start_pos - c if char_positions == "mirrored" else start_pos + c


def char_place(c: Any) -> Any:
    """Place, counted from 1 at the block's end, of the char that the query at char `c` predicts."""
    return c + 1


@dataclass(frozen=True)
class Slots:
    """One stream of slots, as arrays of equal shape, (slots,) or (B, slots).

    Attributes:
        stream: "token" or "char".
        ids: input ids.
        document: number of the packed document within its row; 0 is padding.
        block: index of the slot's block within the document; `<bos>` is alone in block -1.
        index: j for token j; c for char c of its block (`<bob>` has 0).
        start_pos: tokens before the slot's block.
        position: where the slot stands in the document, for the positional encoding.
        place: bytes to the end of the block, from 1; 0 for none.
    """

    stream: Literal["token", "char"]
    ids: Any
    document: Any
    block: Any
    index: Any
    start_pos: Any
    position: Any
    place: Any

    def arrays(self) -> dict[str, Any]:
        """The arrays by name."""
        return {name: getattr(self, name) for name in ARRAYS}

    def map(self, function: Any) -> "Slots":
        """The same slots with `function` applied to every array."""
        return Slots(self.stream, **{name: function(array) for name, array in self.arrays().items()})

    def at(self, where: Any) -> "Slots":
        """The slots at an index, in a slice, or where a mask of the first axis is true."""
        return self.map(lambda array: array[where])

    def queries(self) -> "Slots":
        """Slots whose arrays have a last axis of 1, for broadcasting against `keys()`."""
        return self.map(lambda array: array[..., :, None])

    def keys(self) -> "Slots":
        """Slots whose arrays have a next-to-last axis of 1, for broadcasting against `queries()`."""
        return self.map(lambda array: array[..., None, :])


ARRAYS = tuple(f.name for f in fields(Slots) if f.name != "stream")


def may_see(query: Slots, key: Slots, token_attention: TokenAttention) -> Any:
    """The predicate of attention, by broadcasting: True where the query slot may attend to the key slot.

    Within a document only, and padding neither sees nor is seen:
    token -> token: block(k) <= block(q) ("block"), or index(k) <= index(q) ("causal");
    char -> token: index(k) < start_pos(q); char -> char: the same block and c(k) <= c(q); token -> char: never.
    """
    together = (query.document == key.document) & (key.document != NO_DOCUMENT)
    if query.stream == "token" and key.stream == "token":
        if token_attention == "block":
            return together & (key.block <= query.block)
        return together & (key.index <= query.index)
    if query.stream == "char" and key.stream == "token":
        return together & (key.index < query.start_pos)
    if query.stream == "char" and key.stream == "char":
        return together & (key.block == query.block) & (key.index <= query.index)
    return together & (key.index < 0)  # no index is negative: a token never sees a char


def token_slots(
    ids: np.ndarray, block_tokens: np.ndarray, byte_lengths: np.ndarray, *, first_block: int, start_pos: int
) -> Slots:
    """Slots of the tokens of consecutive whole blocks.

    Args:
        ids: (n,) token ids. block_tokens: (k,) tokens of each block. byte_lengths: (n,) bytes of each token.
        first_block: index of the first of the blocks. start_pos: tokens before it.
    """
    starts = start_pos + np.cumsum(block_tokens) - block_tokens
    return _tokens_of_blocks(ids, block_tokens, byte_lengths, first_block + np.arange(len(block_tokens)), starts)


def _tokens_of_blocks(
    ids: np.ndarray, block_tokens: np.ndarray, byte_lengths: np.ndarray, block: np.ndarray, start_pos: np.ndarray
) -> Slots:
    """Slots of the tokens of whole blocks, which may belong to several documents.

    Args:
        block: (k,) index of each block in its document. start_pos: (k,) tokens before it there.
    """
    ends = np.cumsum(block_tokens)
    of = np.repeat(np.arange(len(block_tokens)), block_tokens)
    index = np.arange(len(ids), dtype=np.int32) + (start_pos - ends + block_tokens).astype(np.int32).take(of)
    ends_of_tokens = np.cumsum(byte_lengths, dtype=np.int32)
    # A token's place is that of its last byte: bytes up to the block's end, less those up to the token's end, from 1.
    places = (ends_of_tokens.take(ends - 1) + np.int32(1)).take(of) - ends_of_tokens
    return Slots(
        stream="token",
        ids=ids,
        document=np.ones_like(index),
        block=block.take(of),
        index=index,
        start_pos=start_pos.take(of),
        position=index,
        place=places,
    )


def bos_slot() -> Slots:
    """The slot of `<bos>`, which stands before the first block."""
    one, zero = np.ones(1, np.int64), np.zeros(1, np.int64)
    return Slots(
        "token", ids=one * BOS, document=one, block=-one, index=zero, start_pos=zero, position=zero, place=zero
    )


def char_slots(ids: Any, c: Any, block: Any, start_pos: Any, char_positions: CharPositions) -> Slots:
    """Slots of chars: `ids` at char `c` of `block`, whose first token would stand at `start_pos`."""
    return Slots(
        stream="char",
        ids=ids,
        document=c * 0 + 1,
        block=block,
        index=c,
        start_pos=start_pos,
        position=char_position(start_pos, c, char_positions),
        place=char_place(c),
    )


def concatenate(parts: Sequence[Slots]) -> Slots:
    """Slots of one stream, laid end to end along the last axis."""
    return _joined(parts, lambda arrays: np.concatenate(arrays, axis=-1))


def stack(parts: Sequence[Slots]) -> Slots:
    """Slots of one stream and equal shape as rows of a batch."""
    return _joined(parts, np.stack)


def _joined(parts: Sequence[Slots], join: Callable[[list[np.ndarray]], np.ndarray]) -> Slots:
    arrays = {name: join([getattr(part, name) for part in parts]) for name in parts[0].arrays()}
    return Slots(parts[0].stream, **arrays)


def lay_out(
    piece: Piece, byte_lengths: np.ndarray, char_positions: CharPositions, place_shift: int = 0
) -> tuple[Slots, Slots, np.ndarray]:
    """The two streams of a piece and the labels of its char stream.

    Args:
        piece: the blocks.
        byte_lengths: bytes that each id stands for (`MixedTokenizer.byte_lengths`).
        char_positions: "mirrored" or "forward".
        place_shift: added to every place of the piece.

    Returns:
        tokens: Slots of shape (t,). chars: Slots of shape (c,). labels: (c,).
    """
    shifts = np.array([place_shift])
    chars, labels, _ = _char_stream([piece], char_positions, shifts)
    return _token_stream([piece], byte_lengths, shifts)[0], chars, labels


def _token_stream(pieces: Sequence[Piece], byte_lengths: np.ndarray, shifts: np.ndarray) -> tuple[Slots, np.ndarray]:
    """The token streams of pieces, end to end, and the number of slots of each; all of document 1.

    `<bos>` is laid out as a block -1 of one token that stands for no byte.
    """
    one, bos = np.ones(1, np.int32), np.full(1, BOS, np.int32)
    counts = np.array([1 + len(p.tokens) - int(p.block_tokens[-1]) for p in pieces])
    block_counts = np.array([len(p.block_tokens) for p in pieces])
    ids = _joined_arrays([a for p, n in zip(pieces, counts, strict=True) for a in (bos, p.tokens[: n - 1])])
    block_tokens = _joined_arrays([a for p in pieces for a in (one, p.block_tokens[:-1])])
    block = _numbered_within(block_counts) - 1
    starts = (np.cumsum(block_tokens) - block_tokens).astype(np.int32)
    first_slots = np.cumsum(counts) - counts
    starts -= np.repeat(first_slots, block_counts).astype(np.int32)
    slots = _tokens_of_blocks(ids, block_tokens, byte_lengths.take(ids), block, starts)
    place = _shifted(slots.place, shifts, counts)
    place[first_slots] = NO_PLACE
    return replace(slots, place=place), counts


def _char_stream(
    pieces: Sequence[Piece], char_positions: CharPositions, shifts: np.ndarray
) -> tuple[Slots, np.ndarray, np.ndarray]:
    """The char streams of pieces, end to end, their labels, and the number of slots of each; all of document 1."""
    block_counts = np.array([len(p.block_bytes) for p in pieces])
    supervised_from = np.array([p.supervised_from for p in pieces])
    block = _numbered_within(block_counts)
    block_tokens = _joined_arrays([p.block_tokens for p in pieces])
    starts = np.cumsum(block_tokens) - block_tokens
    starts = 1 + starts - np.repeat(starts[np.cumsum(block_counts) - block_counts], block_counts)
    own = block >= np.repeat(supervised_from, block_counts)
    sizes = _joined_arrays([p.block_bytes for p in pieces])[own]
    runs = sizes + 1
    ends = np.cumsum(runs)
    run, c = _counted(ends, ends - runs)
    supervised = _joined_arrays([p.chars[int(p.block_bytes[: p.supervised_from].sum()) :] for p in pieces])
    # Of the slots before a char, its own run's and those before it each have one that is no char.
    ids = supervised.take(np.arange(len(run), dtype=np.int32) - run - 1, mode="clip")
    ids[ends - runs] = BOB
    # A run's labels are its input, one char on, and the end mark.
    labels = np.empty_like(ids)
    labels[:-1] = ids[1:]
    labels[ends - 1] = EOB
    ends_of_pieces = np.concatenate([[0], ends])[np.cumsum(block_counts - supervised_from)]
    labels[ends_of_pieces[np.array([p.ends_document for p in pieces])] - 1] = EOS
    counts = np.diff(ends_of_pieces, prepend=0)
    slots = char_slots(ids, c, block[own].take(run), starts[own].astype(np.int32).take(run), char_positions)
    return replace(slots, place=_shifted(slots.place, shifts, counts)), labels, counts


def _counted(ends: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each slot of runs that lie end to end the number of its run, and how far it is from the run's first slot."""
    # A third of the time of np.repeat, where runs are of several slots.
    run = np.zeros(int(ends[-1]) if len(ends) else 0, np.int32)
    run[starts[1:]] = 1
    np.cumsum(run, out=run)
    return run, np.arange(len(run), dtype=np.int32) - starts.astype(np.int32).take(run)


def _shifted(place: np.ndarray, shifts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return place + np.repeat(shifts, counts).astype(np.int32) if shifts.any() else place


def _joined_arrays(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays, dtype=np.int32)


def _numbered_within(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... counts[0] - 1, 0, 1, ... counts[1] - 1, ..."""
    return (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)).astype(np.int32)


def lay_out_rows(
    rows: Sequence[Sequence[Piece]],
    shifts: Sequence[Sequence[int]],
    byte_lengths: np.ndarray,
    char_positions: CharPositions,
    shape: tuple[int, int],
) -> "LaidOut":
    """Rows of packed pieces at once: what `lay_out` and `pack` make of each, stacked.

    Args:
        rows: the pieces of each of B rows; a row may be empty.
        shifts: the shift of places of each piece.
        shape: token slots T and char slots C of a row.

    Returns:
        tokens: Slots of shape (B, T). chars: Slots of shape (B, C). labels: (B, C). All int32.
    """
    pieces = [piece for row in rows for piece in row]
    if not pieces:
        streams = padding("token", (len(rows), shape[0])), padding("char", (len(rows), shape[1]))
        return *streams, np.full((len(rows), shape[1]), IGNORED, np.int32)
    flat_shifts = np.array([shift for row in shifts for shift in row])
    row_pieces = [len(row) for row in rows]
    tokens, token_counts = _token_stream(pieces, byte_lengths, flat_shifts)
    chars, labels, char_counts = _char_stream(pieces, char_positions, flat_shifts)
    ends = _ends_of_rows(char_counts, row_pieces)
    return (
        _in_rows(tokens, token_counts, row_pieces, shape[0]),
        _in_rows(chars, char_counts, row_pieces, shape[1]),
        _padded(labels, ends, shape[1], IGNORED),
    )


def _in_rows(flat: Slots, counts: np.ndarray, row_pieces: list[int], width: int) -> Slots:
    """Slots (B, width) of pieces that lie end to end, `counts` slots of each; pieces are numbered within their row."""
    ends, empty = _ends_of_rows(counts, row_pieces), padding(flat.stream, 1)
    rows = {n: _padded(a, ends, width, int(getattr(empty, n)[0])) for n, a in flat.arrays().items()}
    number = iter(counts.tolist())
    for row, n_pieces in enumerate(row_pieces):
        start = 0
        for document in range(1, n_pieces + 1):
            end = start + next(number)
            rows["document"][row, start:end] = document
            start = end
    return Slots(flat.stream, **rows)


def _ends_of_rows(counts: np.ndarray, row_pieces: list[int]) -> list[int]:
    """Where the slots of each row start, and where those of the last end. counts: (pieces,) slots of each piece."""
    ends_of_pieces = np.concatenate([[0], np.cumsum(counts)])
    return ends_of_pieces[np.concatenate([[0], np.cumsum(row_pieces)])].tolist()


def _padded(flat: np.ndarray, ends: list[int], width: int, value: int) -> np.ndarray:
    """Rows (B, width) of what lies end to end, filled up with `value`."""
    rows = np.empty((len(ends) - 1, width), np.int32)
    for row, (start, end) in enumerate(pairwise(ends)):
        assert end - start <= width, "the row plan overfilled a row"
        rows[row, : end - start] = flat[start:end]
        rows[row, end - start :] = value
    return rows


LaidOut = tuple[Slots, Slots, np.ndarray]  # tokens, chars and labels of a document or a row


def alone(row: LaidOut, document: int) -> LaidOut:
    """One document of a packed row, as the row's only one and without padding."""
    tokens, chars, labels = row
    own = chars.document == document
    streams = (tokens.at(tokens.document == document), chars.at(own))
    first, second = (replace(s, document=np.ones_like(s.document)) for s in streams)
    return first, second, labels[own]


def place_count(max_block_bytes: int, place_shift: int) -> int:
    """Number of different places, "none" included: the end mark of the longest block has the largest."""
    return 1 + char_place(max_block_bytes) + place_shift


def padding(stream: Literal["token", "char"], shape: int | tuple[int, ...]) -> Slots:
    """Slots of padding, in arrays of their own."""
    values = {"ids": PAD, "document": NO_DOCUMENT, "place": NO_PLACE}
    names = [f.name for f in fields(Slots) if f.name != "stream"]
    return Slots(stream, **{name: np.full(shape, values.get(name, 0), np.int32) for name in names})


def pack(
    laid_out: Sequence[tuple[Slots, Slots, np.ndarray]], row_tokens: int, row_chars: int
) -> tuple[Slots, Slots, np.ndarray]:
    """One row of `row_tokens` token slots and `row_chars` char slots from documents that fit in it."""
    token_parts = [replace(t, document=t.document * n) for n, (t, _, _) in enumerate(laid_out, 1)]
    char_parts = [replace(c, document=c.document * n) for n, (_, c, _) in enumerate(laid_out, 1)]
    n_tokens = sum(len(t.ids) for t in token_parts)
    n_chars = sum(len(c.ids) for c in char_parts)
    assert n_tokens <= row_tokens, "the row plan overfilled a row"
    assert n_chars <= row_chars, "the row plan overfilled a row"
    tokens = concatenate([*token_parts, padding("token", row_tokens - n_tokens)])
    chars = concatenate([*char_parts, padding("char", row_chars - n_chars)])
    labels = np.concatenate([*(y for _, _, y in laid_out), np.full(row_chars - n_chars, IGNORED, np.int32)])
    return tokens, chars, labels
