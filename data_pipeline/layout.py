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

from data_pipeline.segmentation import segment
from data_pipeline.tokenizer import BOB, BOS, EOB, EOS, PAD, MixedTokenizer

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


def reverse_block(data: bytes) -> bytes:
    """A block's bytes in the order of generation, or a generated block's bytes in reading order."""
    return data[::-1]


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
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "stream"}

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


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one cut at block borders, as blocks.

    Attributes:
        tokens: (n,) token ids of all blocks.
        chars: (m,) uint8, every block's bytes reversed, block after block.
        block_tokens: (k,) tokens of each block.
        block_bytes: (k,) bytes of each block.
        supervised_from: first supervised block; those before it are a prompt.
        ends_document: the last block ends in `<eos>`; otherwise in `<eob>`.
    """

    tokens: np.ndarray
    chars: np.ndarray
    block_tokens: np.ndarray
    block_bytes: np.ndarray
    supervised_from: int = 0
    ends_document: bool = True


def piece_of_blocks(
    blocks: Sequence[str], tokenizer: MixedTokenizer, supervised_from: int = 0, ends_document: bool = True
) -> Piece:
    """The piece that consists of `blocks`."""
    encoded = [tokenizer.encode_block(block) for block in blocks]
    data = [reverse_block(block.encode()) for block in blocks]
    return Piece(
        tokens=np.array([i for ids in encoded for i in ids], dtype=np.int64),
        chars=np.frombuffer(b"".join(data), dtype=np.uint8),
        block_tokens=np.array([len(ids) for ids in encoded], dtype=np.int64),
        block_bytes=np.array([len(d) for d in data], dtype=np.int64),
        supervised_from=supervised_from,
        ends_document=ends_document,
    )


def piece_of_text(prompt: str, text: str, tokenizer: MixedTokenizer) -> Piece:
    """The piece of a whole document; `prompt` and `text` are segmented apart, and only `text` is supervised."""
    before = segment(prompt, tokenizer.segmentation)
    return piece_of_blocks(before + segment(text, tokenizer.segmentation), tokenizer, len(before))


def beginning(piece: Piece, end: int) -> Piece:
    """The blocks of a piece before block `end`; where that leaves some out, the document does not end there."""
    return replace(
        piece,
        tokens=piece.tokens[: piece.block_tokens[:end].sum()],
        chars=piece.chars[: piece.block_bytes[:end].sum()],
        block_tokens=piece.block_tokens[:end],
        block_bytes=piece.block_bytes[:end],
        ends_document=piece.ends_document and end >= len(piece.block_bytes),
    )


def blocks_of_piece(piece: Piece) -> list[str]:
    """The texts of a piece's blocks."""
    data, ends = piece.chars.tobytes(), np.cumsum(piece.block_bytes).tolist()
    return [reverse_block(data[start:end]).decode() for start, end in pairwise([0, *ends])]


def slot_counts(block_tokens: np.ndarray, block_bytes: np.ndarray, supervised_from: int) -> tuple[int, int]:
    """Token slots and char slots that a piece of these blocks takes."""
    supervised = block_bytes[supervised_from:]
    return 1 + int(block_tokens[:-1].sum()), int(supervised.sum()) + len(supervised)


def token_slots(
    ids: np.ndarray, block_tokens: np.ndarray, byte_lengths: np.ndarray, *, first_block: int, start_pos: int
) -> Slots:
    """Slots of the tokens of consecutive whole blocks.

    Args:
        ids: (n,) token ids. block_tokens: (k,) tokens of each block. byte_lengths: (n,) bytes of each token.
        first_block: index of the first of the blocks. start_pos: tokens before it.
    """
    n_blocks = len(block_tokens)
    block = np.repeat(np.arange(n_blocks), block_tokens)
    index = start_pos + np.arange(len(ids))
    starts = np.cumsum(block_tokens) - block_tokens
    ends_of_tokens = np.cumsum(byte_lengths)
    # A token's place is that of its last byte: bytes up to the block's end, less those up to the token's end, from 1.
    places = ends_of_tokens[(starts + block_tokens - 1)[block]] - ends_of_tokens + 1
    return Slots(
        stream="token",
        ids=ids,
        document=np.ones_like(index),
        block=first_block + block,
        index=index,
        start_pos=start_pos + starts[block],
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
        tokens: Slots of shape (t,). chars: Slots of shape (c,). labels: (c,) int64.
    """
    n_read = int(piece.block_tokens[:-1].sum())
    ids = piece.tokens[:n_read]
    tokens = concatenate(
        [
            bos_slot(),
            token_slots(ids, piece.block_tokens[:-1], byte_lengths[ids], first_block=0, start_pos=1),
        ]
    )
    s = piece.supervised_from
    sizes = piece.block_bytes[s:].astype(np.int64)
    run = np.repeat(np.arange(len(sizes)), sizes + 1)
    run_starts = np.cumsum(sizes + 1) - (sizes + 1)
    c = np.arange(len(run)) - run_starts[run]
    start_pos = (1 + np.cumsum(piece.block_tokens) - piece.block_tokens)[s:][run]
    supervised = piece.chars[int(piece.block_bytes[:s].sum()) :].astype(np.int64)
    ids = np.empty(len(run), np.int64)
    labels = np.empty(len(run), np.int64)
    is_bob = c == 0
    ids[is_bob], ids[~is_bob] = BOB, supervised
    is_end = c == sizes[run]
    labels[is_end], labels[~is_end] = EOB, supervised
    if piece.ends_document:
        labels[-1] = EOS
    chars = char_slots(ids, c, s + run, start_pos, char_positions)
    if place_shift:
        tokens, chars = shift_places(tokens, place_shift), shift_places(chars, place_shift)
    return tokens, chars, labels


LaidOut = tuple[Slots, Slots, np.ndarray]  # tokens, chars and labels of a document or a row


def alone(row: LaidOut, document: int) -> LaidOut:
    """One document of a packed row, as the row's only one and without padding."""
    tokens, chars, labels = row
    own = chars.document == document
    streams = (tokens.at(tokens.document == document), chars.at(own))
    first, second = (replace(s, document=np.ones_like(s.document)) for s in streams)
    return first, second, labels[own]


def shift_places(slots: Slots, shift: int) -> Slots:
    """The slots with `shift` added to every place; what has no place gets none."""
    return replace(slots, place=np.where(slots.place == NO_PLACE, NO_PLACE, slots.place + shift))


def place_count(max_block_bytes: int, place_shift: int) -> int:
    """Number of different places, "none" included: the end mark of the longest block has the largest."""
    return 1 + char_place(max_block_bytes) + place_shift


def padding(stream: Literal["token", "char"], count: int) -> Slots:
    """`count` slots of padding."""
    zero = np.zeros(count, np.int64)
    return Slots(stream, zero + PAD, zero + NO_DOCUMENT, zero, zero, zero, zero, zero + NO_PLACE)


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
    labels = np.concatenate([*(y for _, _, y in laid_out), np.full(row_chars - n_chars, IGNORED, np.int64)])
    return tokens, chars, labels
