"""The text that measurements are made on: of the configured corpus, as files, as shards, as rows of plain ids."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data_pipeline.corpus import CorpusConfig, ReadCounts, SourceConfig, read_documents
from data_pipeline.errors import CorpusError
from data_pipeline.files import whole_file
from data_pipeline.ordering import RowAddress
from data_pipeline.pieces import Piece
from data_pipeline.prepare import prepare
from data_pipeline.rows import RowReader, row_format_of
from data_pipeline.run_order import SPLIT
from data_pipeline.shards import DataConfig, Manifest
from data_pipeline.tokenizer import BOS, EOS, PAD, MixedTokenizer, train_tokenizer
from tidal_dist.config import Config

Unit = Literal["bytes", "tokens"]

_CHANGED_WORDS = 25  # of a copy: each copy has that many new words, so blocks never stop being new


def texts_of(corpus: CorpusConfig) -> list[str]:
    """All documents, prompts included.

    Raises:
        CorpusError: there is no text.
    """
    texts = [d.prompt + d.text for d in read_documents(corpus, ReadCounts())]
    if not any(texts):
        raise CorpusError("the corpus has no text; check corpus.sources")
    return texts


def tokenizer_of(config: Config) -> MixedTokenizer:
    """The configured tokeniser, trained on the corpus where it has no path."""
    if config.tokenizer.path:
        return MixedTokenizer.load(config.tokenizer.path, config.segmentation)
    return train_tokenizer(iter(texts_of(config.corpus)), config.tokenizer, config.segmentation)


def write_corpus(texts: Sequence[str], folder: Path, size: int) -> int:
    """JSON lines of copies of the texts, one file a copy, until there are `size` bytes of text; how many there are."""
    words = [w for w in dict.fromkeys(" ".join(texts[:200]).split()) if w.isalpha() and len(w) > 6][:_CHANGED_WORDS]
    written, copy = 0, 0
    while written < size:
        with whole_file(folder / f"copy-{copy:04d}.jsonl") as file:
            for text in texts:
                for word in words if copy else []:
                    text = text.replace(word, f"{word}{copy}x")
                file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
                written += len(text.encode())
                if written >= size:
                    break
        copy += 1
    return written


def copies(folder: Path) -> CorpusConfig:
    """The corpus that `write_corpus` wrote."""
    source = SourceConfig(path=str(folder), format="jsonl", name="copies")
    return CorpusConfig(sources=[source], validation_fraction=0.001)


def write_shards(config: Config, folder: Path, size: int, lanes: int) -> tuple[Manifest, DataConfig, MixedTokenizer]:
    """Shards of `size` bytes of the corpus in rows of the configured slots, with the tokeniser that they have.

    Args:
        lanes: of the rows' order.
    """
    tokenizer = tokenizer_of(config)
    tokenizer.save(folder / "tokenizer.json")
    write_corpus(texts_of(config.corpus), folder / "corpus", size)
    changes = {"shards": str(folder / "shards"), "lanes": lanes, "mix": [], "overlap_tokens": 0}
    data = config.data.model_copy(update=changes)
    known = config.tokenizer.model_copy(update={"path": str(folder / "tokenizer.json")})
    manifest = prepare(copies(folder / "corpus"), known, config.segmentation, data, config.to_yaml())
    return manifest, data, tokenizer


def first_rows(manifest: Manifest, data: DataConfig, tokenizer: MixedTokenizer, count: int) -> list[list[Piece]]:
    """The pieces of documents in the first rows of the first shard.

    Raises:
        CorpusError: there are fewer rows.
    """
    reader = RowReader(manifest, SPLIT, tokenizer, row_format_of(data), data.seed)
    if reader.shard_rows[0] < count:
        raise CorpusError(
            f"the text fills {reader.shard_rows[0]} rows, the bench needs {count}; use fewer or more text"
        )
    return [reader.pieces(RowAddress(0, 0, row)) for row in range(count)]


def plain_ids(piece: Piece, unit: Unit) -> np.ndarray:
    """`<bos>`, the piece's bytes or tokens in reading order, and `<eos>` where it ends its document."""
    ends = np.cumsum(piece.block_bytes)
    turned = np.repeat(2 * ends - piece.block_bytes - 1, piece.block_bytes) - np.arange(len(piece.chars))
    text = piece.chars[turned] if unit == "bytes" else piece.tokens
    return np.concatenate([[BOS], text, [EOS] * piece.ends_document]).astype(np.int64)


def plain_rows(rows: Sequence[Sequence[Piece]], unit: Unit, width: int | None = None) -> torch.Tensor:
    """The text of rows as rows of plain ids (B, N), padded to the longest.

    Args:
        width: N, positions that every row has instead: the text, laid end to end and again from its start where it
            ends too soon, is cut after each.
    """
    flat = [np.concatenate([plain_ids(piece, unit) for piece in row]) for row in rows]
    if width is not None:
        return torch.from_numpy(np.resize(np.concatenate(flat), (len(rows), width)))
    padded = np.full((len(flat), max(len(row) for row in flat)), PAD)
    for row, ids in zip(padded, flat, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(padded)
