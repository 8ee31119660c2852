"""What the model is compared with, laid out in the slots of its own two streams, so that one loop trains all of them.

- Blocks written from their start (`char_order: forward`): the ablation of the direction. Places, too, are counted from
  where writing begins.
- Plain decoders (`writes: tokens` or `bytes`): a document is one block that is written forward, by BPE tokens or by
  bytes, with nothing before it but `<bos>`. All that a plain decoder needs follows from it: each unit sees those before
  it, prompts are context without a loss, `<eos>` ends the document.

They are laid out of the same rows, and so read the same text in the same order.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import numpy as np

from data_pipeline.layout import (
    IGNORED,
    NO_PLACE,
    CharPositions,
    LaidOut,
    Slots,
    bos_slot,
    char_slots,
    lay_out_rows,
    pack,
    stack,
)
from data_pipeline.packing import RowPlan
from data_pipeline.pieces import Piece, reverse_block
from data_pipeline.tokenizer import BOB, EOS

CharOrder = Literal["reversed", "forward"]
Writes = Literal["blocks", "tokens", "bytes"]
Unit = Literal["tokens", "bytes"]

_MULTIPLE = 8  # of the width of a row


def in_reading_order(piece: Piece) -> Piece:
    """The piece with every block's bytes from its start to its end."""
    data, ends = piece.chars.tobytes(), np.cumsum(piece.block_bytes).tolist()
    text = b"".join(reverse_block(data[start:end]) for start, end in pairwise([0, *ends]))
    return replace(piece, chars=np.frombuffer(text, np.uint8))


def lay_out_forward_rows(
    rows: Sequence[Sequence[Piece]],
    shifts: Sequence[Sequence[int]],
    byte_lengths: np.ndarray,
    char_positions: CharPositions,
    shape: tuple[int, int],
) -> LaidOut:
    """As `lay_out_rows`, with blocks that are written from their start to their end."""
    turned = [[in_reading_order(piece) for piece in row] for row in rows]
    unshifted = [[0] * len(row) for row in rows]
    tokens, chars, labels = lay_out_rows(turned, unshifted, byte_lengths, char_positions, shape)
    tokens = replace(tokens, place=_places_from_start(tokens, byte_lengths))
    return _shifted(tokens, shifts), _shifted(chars, shifts), labels


def _places_from_start(tokens: Slots, byte_lengths: np.ndarray) -> np.ndarray:
    """Of tokens (B, T) the place, from 1, of their first byte, counted from the start of their block."""
    ends = np.cumsum(byte_lengths.take(tokens.ids), axis=1)
    begins = ends - byte_lengths.take(tokens.ids)
    first_of_block = np.arange(tokens.ids.shape[1]) - (tokens.index - tokens.start_pos)
    place = begins - np.take_along_axis(begins, first_of_block, axis=1) + 1
    return np.where(tokens.place == NO_PLACE, NO_PLACE, place).astype(np.int32)


def _shifted(slots: Slots, shifts: Sequence[Sequence[int]]) -> Slots:
    """Slots (B, n) with each document's shift added to its places."""
    table = np.zeros((len(shifts), 1 + max((len(row) for row in shifts), default=0)), np.int32)
    for row, of_row in enumerate(shifts):
        table[row, 1 : 1 + len(of_row)] = of_row
    added = np.take_along_axis(table, slots.document, axis=1)
    return replace(slots, place=np.where(slots.place == NO_PLACE, NO_PLACE, slots.place + added))


def lay_out_plain(piece: Piece, unit: Unit) -> LaidOut:
    """A piece as one block of tokens or bytes in reading order; what stands before its text carries no loss."""
    ids, sizes = (piece.tokens, piece.block_tokens) if unit == "tokens" else (_bytes_of(piece), piece.block_bytes)
    labels = np.concatenate([ids, [EOS if piece.ends_document else IGNORED]])
    labels[: int(sizes[: piece.supervised_from].sum())] = IGNORED
    return *plain_slots(ids), labels


def plain_slots(ids: np.ndarray) -> tuple[Slots, Slots]:
    """Tokens (1,) and chars (1 + n,) of a document that begins with these n units."""
    c = np.arange(1 + len(ids))
    chars = char_slots(np.concatenate([[BOB], ids]), c, np.zeros_like(c), np.ones_like(c), "forward")
    return bos_slot(), replace(chars, place=np.full_like(c, NO_PLACE))


def _bytes_of(piece: Piece) -> np.ndarray:
    return in_reading_order(piece).chars.astype(np.int64)


def lay_out_plain_rows(rows: Sequence[Sequence[Piece]], unit: Unit, shape: tuple[int, int]) -> LaidOut:
    """Rows of packed pieces for a plain decoder: tokens (B, T), one `<bos>` a piece; chars and labels (B, C)."""
    packed = [pack([lay_out_plain(piece, unit) for piece in row], *shape) for row in rows]
    tokens, chars, labels = zip(*packed, strict=True)
    return _int32(stack(tokens)), _int32(stack(chars)), np.stack(labels).astype(np.int32)


def _int32(slots: Slots) -> Slots:
    return slots.map(lambda array: array.astype(np.int32))


def plain_shape(plans: Sequence[RowPlan], unit: Unit) -> tuple[int, int]:
    """Slots (T, C) in which every row of these plans fits."""
    pieces = width = 1
    for plan in plans:
        units = 1 + getattr(plan, unit).astype(np.int64)
        starts = np.concatenate([[0], plan.row_ends[:-1]]).astype(np.int64)
        if plan.rows:
            width = max(width, int(np.add.reduceat(units, starts).max()))
            pieces = max(pieces, int(np.diff(plan.row_ends.astype(np.int64), prepend=0).max()))
    return pieces, -(-width // _MULTIPLE) * _MULTIPLE
