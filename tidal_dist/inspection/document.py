"""Which document is shown: one of a split of shards, cut as training cuts it, or a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.layout import CharPositions, Slots, TokenAttention, lay_out
from data_pipeline.packing import DocumentLengths, plan_rows
from data_pipeline.pieces import Piece, piece_of_text, slot_counts
from data_pipeline.shard_reader import ShardReader
from data_pipeline.shards import MANIFEST, DataConfig, Manifest
from data_pipeline.tokenizer import MixedTokenizer
from tidal_dist.config import load_config
from tidal_dist.errors import UserError
from tidal_dist.export.package import CONFIG, load_export
from tidal_dist.model.transformer import TidalTransformer


@dataclass(frozen=True)
class Shards:
    """Prepared shards and the rows that their own configuration asks for."""

    manifest: Manifest
    data: DataConfig


@dataclass(frozen=True)
class Source:
    """What lays a document out, and the model that reads it, if there is one. `shards` is None for an export."""

    tokenizer: MixedTokenizer
    char_positions: CharPositions
    token_attention: TokenAttention
    model: TidalTransformer | None
    shards: Shards | None


@dataclass(frozen=True)
class Shown:
    """A document, or a piece of one, as a row of its own.

    Attributes:
        title: what it is. where: the same as fields. piece: its blocks.
        tokens: Slots of shape (T,). chars: Slots of shape (C,). labels: (C,) int64.
    """

    title: str
    where: dict[str, str | int]
    piece: Piece
    tokens: Slots
    chars: Slots
    labels: np.ndarray


def open_source(folder: Path, export: Path | None) -> Source:
    """Shards, with the model of `export` if one is given, or an export.

    Raises:
        UserError: the folder is neither, or `export` is given beside an export.
        ShardError: the model was trained with another tokeniser or segmentation than the shards.
    """
    if (folder / MANIFEST).exists():
        return _source_of_shards(folder, export)
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder}: neither shards (no {MANIFEST}) nor an export (no {CONFIG}); check the path")
    if export is not None:
        raise UserError(f"--model {export}: {folder} is an export and brings its own model; leave --model out")
    exported = load_export(folder)
    config = exported.model.config
    return Source(exported.tokenizer, config.char_positions, config.token_attention, exported.model, None)


def _source_of_shards(folder: Path, export: Path | None) -> Source:
    manifest, config = Manifest.load(folder), load_config(folder / "config.yaml")
    tokenizer, model, settings = manifest.tokenizer(), None, config.model
    if export is not None:
        exported = load_export(export)
        manifest.check(exported.tokenizer)
        model, settings = exported.model, exported.model.config
    shards = Shards(manifest, config.data)
    return Source(tokenizer, settings.char_positions, settings.token_attention, model, shards)


def given_text(source: Source, prompt: str, text: str) -> Shown:
    """A text, whatever its length, after a prompt that is not supervised."""
    return _shown(source, piece_of_text(prompt, text, source.tokenizer), "text", {"source": "text"})


def stored_document(source: Source, split: str, number: int, piece: int | None) -> Shown:
    """Document `number`, counted from 0 over all shards of a split, or one of its pieces.

    Raises:
        UserError: there are no shards, no such document or no such piece, or a piece must be chosen.
    """
    if source.shards is None:
        raise UserError("--document needs shards: give a shard folder as SOURCE, and the export with --model")
    manifest, data = source.shards.manifest, source.shards.data
    entry, within = _locate(manifest, split, number)
    lengths = _lengths_of_one(manifest.lengths(entry), within)
    pieces = _pieces(lengths, data, entry["name"])
    first, supervised, end = pieces[_chosen(pieces, piece, lengths, data, f"{split} document {number}")]
    reader = ShardReader(manifest.storage, entry)
    _, (file, line) = reader.document(within)
    n_blocks = len(lengths.block_bytes)
    where = {"source": "document", "split": split, "document": number, "shard": entry["name"], "file": file}
    where |= {"line": line, "piece": piece or 0, "pieces": len(pieces), "first_block": first, "end_block": end}
    title = f"{split} document {number}, number {within} of {entry['name']}, from {file}:{line}"
    if len(pieces) > 1:
        title += f"; piece {piece} of 0..{len(pieces) - 1}: blocks {first}..{end - 1} of 0..{n_blocks - 1}"
    return _shown(source, reader.piece(within, first, end, supervised), title, where)


def _shown(source: Source, piece: Piece, title: str, where: dict[str, str | int]) -> Shown:
    return Shown(title, where, piece, *lay_out(piece, source.tokenizer.byte_lengths, source.char_positions))


def _locate(manifest: Manifest, split: str, number: int) -> tuple[dict, int]:
    """The shard of a split's document, and the document's number within it.

    Raises:
        UserError: the split has no such document.
    """
    shards = manifest.shards(split)
    ends = np.cumsum([shard["documents"] for shard in shards], dtype=np.int64)
    if not len(ends):
        raise UserError(f"{manifest.where}: the {split} split is empty; choose the other one with --split")
    if number >= ends[-1]:
        raise UserError(f"--document {number}: {split} has the documents 0..{ends[-1] - 1}; choose one of them")
    shard = int(np.searchsorted(ends, number, side="right"))
    return shards[shard], number - int(ends[shard - 1] if shard else 0)


def _lengths_of_one(lengths: DocumentLengths, document: int) -> DocumentLengths:
    """The lengths of one document of a shard, as of a shard with no other."""
    start = int(lengths.document_blocks[:document].sum(dtype=np.int64))
    own, blocks = slice(document, document + 1), slice(start, start + int(lengths.document_blocks[document]))
    return DocumentLengths(
        document_blocks=lengths.document_blocks[own],
        prompt_blocks=lengths.prompt_blocks[own],
        block_tokens=lengths.block_tokens[blocks],
        block_bytes=lengths.block_bytes[blocks],
    )


def _pieces(lengths: DocumentLengths, data: DataConfig, where: str) -> list[tuple[int, int, int]]:
    """First block, first supervised block and end of the pieces that training makes of one document, in its order."""
    plan = plan_rows(lengths, data.row_tokens, data.row_chars, where, data.overlap_tokens)
    addresses = (address for row in range(plan.rows) for address in plan.addresses(row))
    return sorted((a.first_block, a.supervised_block, a.end_block) for a in addresses)


def _chosen(
    pieces: Sequence[tuple[int, int, int]], piece: int | None, lengths: DocumentLengths, data: DataConfig, what: str
) -> int:
    """Index of the piece to show; without a choice that of a document that is not cut.

    Raises:
        UserError: there is no such piece, or the document is cut and no piece is chosen.
    """
    if piece is not None and piece >= len(pieces):
        raise UserError(f"--piece {piece}: training cuts {what} into the pieces 0..{len(pieces) - 1}; choose one")
    if piece is None and len(pieces) > 1:
        tokens, chars = slot_counts(lengths.block_tokens, lengths.block_bytes, int(lengths.prompt_blocks[0]))
        raise UserError(
            f"{what} takes {tokens:,} token slots and {chars:,} char slots, a row holds {data.row_tokens:,} and "
            f"{data.row_chars:,}: training cuts it into {len(pieces)} pieces; choose one with "
            f"--piece 0..{len(pieces) - 1}"
        )
    return piece or 0
