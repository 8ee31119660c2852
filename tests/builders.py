"""Small tokenisers, models and packed rows for tests."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from data_pipeline.layout import CharPositions, lay_out, pack
from data_pipeline.packing import DocumentLengths, plan_rows
from data_pipeline.pieces import piece_of_blocks
from data_pipeline.segmentation import SegmentationConfig, segment
from data_pipeline.stream import Batch, batch_of_rows
from data_pipeline.tokenizer import MixedTokenizer, TokenizerConfig, train_tokenizer
from tidal_dist.config import ModelConfig
from tidal_dist.doctor.oracle import Document
from tidal_dist.model.transformer import TidalTransformer

TEXTS = (
    "the tide runs out and the tide comes in",
    "12 + 34 = 46; 7 + 8 = 15; 123 - 145 = -22",
    "潮水退去，潮水又来。潮汐模型从右往左写。",
    "un café déjà vu, naïve Straße 👍🏽 👩‍🚀",
)


@lru_cache
def small_tokenizer(max_block_bytes: int = 8) -> MixedTokenizer:
    """A tokeniser with a few merges, so that blocks are one token or several."""
    segmentation = SegmentationConfig(max_block_bytes=max_block_bytes)
    return train_tokenizer(TEXTS * 3, TokenizerConfig(vocab_size=330), segmentation)


def document_of(text: str, prompt: str = "", max_block_bytes: int = 8) -> Document:
    """A whole document, its prompt and its text segmented apart."""
    config = SegmentationConfig(max_block_bytes=max_block_bytes)
    return Document(tuple(segment(prompt, config)), tuple(segment(text, config)))


def small_model(
    tokenizer: MixedTokenizer, seed: int = 0, dtype: torch.dtype = torch.float64, **settings: Any
) -> TidalTransformer:
    """A model of random weights, those of the norms included."""
    torch.manual_seed(seed)
    config = ModelConfig(**{"n_layers": 3, "width": 16, "n_heads": 2, **settings})
    model = TidalTransformer(config, tokenizer.vocab_size, tokenizer.segmentation.max_block_bytes).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def planned(documents: Sequence[Document], tokenizer: MixedTokenizer, shape: tuple[int, int]) -> list[list[Document]]:
    """The pieces of documents of each row of `shape` token and char slots, by the product's row plan."""
    pieces = [piece_of_blocks([*d.prompt, *d.text], tokenizer) for d in documents]
    lengths = DocumentLengths(
        document_blocks=np.array([len(p.block_tokens) for p in pieces]),
        prompt_blocks=np.array([len(d.prompt) for d in documents]),
        block_tokens=np.concatenate([p.block_tokens for p in pieces]),
        block_bytes=np.concatenate([p.block_bytes for p in pieces]),
    )
    plan = plan_rows(lengths, *shape, where="a test")
    return [[_cut_out(documents[n], first, end) for n, first, end in plan.pieces(row)] for row in range(plan.rows)]


def _cut_out(document: Document, first: int, end: int) -> Document:
    blocks = [*document.prompt, *document.text]
    text_from = max(first, len(document.prompt))
    is_end = document.ends and end == len(blocks)
    return Document(tuple(blocks[first:text_from]), tuple(blocks[text_from:end]), is_end)


def packed(
    rows: Sequence[Sequence[Document]],
    tokenizer: MixedTokenizer,
    shape: tuple[int, int],
    char_positions: CharPositions = "mirrored",
    place_shift: int = 0,
) -> Batch:
    """Rows of documents as a batch of `shape` token and char slots."""
    return batch_of_rows(
        [
            pack(
                [
                    lay_out(
                        piece_of_blocks([*d.prompt, *d.text], tokenizer, len(d.prompt), d.ends),
                        tokenizer.byte_lengths,
                        char_positions,
                        place_shift,
                    )
                    for d in row
                ],
                *shape,
            )
            for row in rows
        ]
    )
