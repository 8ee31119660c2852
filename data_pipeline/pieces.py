"""Documents as blocks: what the layout lays out and the row plan cuts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from data_pipeline.segmentation import segment
from data_pipeline.tokenizer import MixedTokenizer


def reverse_block(data: bytes) -> bytes:
    """A block's bytes in the order of generation, or a generated block's bytes in reading order."""
    return data[::-1]


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
