"""WebDataset shards: tars of block-reversed documents, an index beside each, and a manifest.

A tar member group (one WebDataset sample) holds many documents as numpy arrays:

    chars.npy            uint8, the bytes of every block, reversed within the block
    tokens.npy           uint16 or uint32, the token ids
    block_tokens.npy     uint8, tokens of each block
    block_bytes.npy      uint8, bytes of each block
    document_blocks.npy  uint32, blocks of each document
    prompt_blocks.npy    uint32, its leading blocks that are not supervised
    files.json           the files that the documents come from
    origin_file.npy      uint32, index into files.json of each document's file
    origin_line.npy      uint32, its line there, from 1, or 0 for a whole file

The index repeats the lengths of a whole shard, so that rows are planned without reading text. The manifest is
written last: a folder without one holds no shards.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from data_pipeline.corpus import Document
from data_pipeline.errors import ShardError
from data_pipeline.files import read_description, replace_file, sha256_of, whole_file
from data_pipeline.layout import Piece, piece_of_text
from data_pipeline.packing import DocumentLengths
from data_pipeline.section import Section
from data_pipeline.segmentation import SegmentationConfig, segmentation_hash
from data_pipeline.tokenizer import MixedTokenizer

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
_MEMBER_BYTES = 1 << 20
_MEMBER_DOCUMENTS = 4096
_LENGTHS = ("document_blocks", "prompt_blocks", "block_tokens", "block_bytes")


class DataConfig(Section):
    """Shards, rows and their order."""

    shards: str = Field(description="the folder of the shards")
    shard_bytes: int = Field(64_000_000, ge=1, description="text of one shard, about, in bytes")
    row_tokens: int = Field(ge=2, description="token slots of a row (T)")
    row_chars: int = Field(ge=2, description="char slots of a row (C)")
    lanes: int = Field(8, ge=1, description="independent streams of rows; divides the global batch, ranks divide it")
    seed: int = Field(1, ge=0, description="seed of the order of the rows")
    workers: int = Field(1, ge=0, description="loader processes of each rank; 0 loads in the training process")


@dataclass
class _Member:
    """Documents gathered for one member group."""

    pieces: list[Piece] = field(default_factory=list)
    origins: list[tuple[str, int]] = field(default_factory=list)
    text_bytes: int = 0


class ShardWriter:
    """Writes the shards of one split, each whole or not at all."""

    def __init__(self, folder: Path, split: str, tokenizer: MixedTokenizer, shard_bytes: int):
        self._folder = folder / split
        self._split = split
        self._tokenizer = tokenizer
        self._shard_bytes = shard_bytes
        self._member_bytes = min(_MEMBER_BYTES, shard_bytes)
        self._token_type = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        self._member = _Member()
        self._members: list[_Member] = []
        self.entries: list[dict[str, Any]] = []

    def write(self, document: Document) -> None:
        """Add a document."""
        piece = piece_of_text(document.prompt, document.text, self._tokenizer)
        self._member.pieces.append(piece)
        self._member.origins.append(document.origin)
        self._member.text_bytes += len(piece.chars)
        if self._member.text_bytes >= self._member_bytes or len(self._member.pieces) >= _MEMBER_DOCUMENTS:
            self._end_member()
            if sum(m.text_bytes for m in self._members) >= self._shard_bytes:
                self._end_shard()

    def close(self) -> list[dict[str, Any]]:
        """Write what is left; the manifest's entries of all shards."""
        self._end_member()
        self._end_shard()
        return self.entries

    def _end_member(self) -> None:
        if self._member.pieces:
            self._members.append(self._member)
            self._member = _Member()

    def _end_shard(self) -> None:
        if not self._members:
            return
        import webdataset  # only writing needs it, so that reading and generation work without

        name = f"shard-{len(self.entries):06d}"
        path = self._folder / f"{name}.tar"
        all_arrays = [self._arrays(member) for member in self._members]
        with whole_file(path) as file, webdataset.TarWriter(file, mtime=0) as tar:
            for number, (member, arrays) in enumerate(zip(self._members, all_arrays, strict=True)):
                tar.write({"__key__": f"{number:06d}"} | arrays | _origins(member))
        lengths = {key: np.concatenate([a[f"{key}.npy"] for a in all_arrays]) for key in _LENGTHS}
        index = self._folder / f"{name}.index.npz"
        with whole_file(index) as file:
            np.savez_compressed(file, allow_pickle=False, **lengths)
        self.entries.append(
            {
                "name": f"{self._split}/{name}",
                "bytes": path.stat().st_size,
                "sha256": sha256_of(path),
                "index_sha256": sha256_of(index),
                "documents": len(lengths["document_blocks"]),
                "blocks": len(lengths["block_bytes"]),
                "tokens": int(lengths["block_tokens"].sum()),
                "text_bytes": int(lengths["block_bytes"].sum()),
                "supervised_bytes": sum(_supervised_bytes(p) for m in self._members for p in m.pieces),
            }
        )
        self._members = []

    def _arrays(self, member: _Member) -> dict[str, np.ndarray]:
        pieces = member.pieces
        return {
            "chars.npy": np.concatenate([p.chars for p in pieces]),
            "tokens.npy": np.concatenate([p.tokens for p in pieces]).astype(self._token_type),
            "block_tokens.npy": np.concatenate([p.block_tokens for p in pieces]).astype(np.uint8),
            "block_bytes.npy": np.concatenate([p.block_bytes for p in pieces]).astype(np.uint8),
            "document_blocks.npy": np.array([len(p.block_bytes) for p in pieces], dtype=np.uint32),
            "prompt_blocks.npy": np.array([p.supervised_from for p in pieces], dtype=np.uint32),
        }


def _origins(member: _Member) -> dict[str, Any]:
    files = {name: i for i, name in enumerate(dict.fromkeys(file for file, _ in member.origins))}
    return {
        "files.json": list(files),
        "origin_file.npy": np.array([files[file] for file, _ in member.origins], dtype=np.uint32),
        "origin_line.npy": np.array([line for _, line in member.origins], dtype=np.uint32),
    }


def _supervised_bytes(piece: Piece) -> int:
    return int(piece.block_bytes[piece.supervised_from :].sum())


@dataclass(frozen=True)
class Manifest:
    """What a shard folder holds. `content` is the manifest file as it is; `hash` is that of its bytes."""

    folder: Path
    content: dict[str, Any]
    hash: str

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Read a folder's manifest.

        Raises:
            ShardError: there is none, or it cannot be read.
        """
        content, data = read_description(
            Path(folder) / MANIFEST,
            FORMAT,
            {"splits", "segmentation", "segmentation_hash", "tokenizer_hash"},
            ShardError,
            f"{folder}: no {MANIFEST}, so no shards here; run `tidal prepare` first",
            "prepare the shards anew",
        )
        return cls(Path(folder), content, hashlib.sha256(data).hexdigest())

    def shards(self, split: str) -> list[dict[str, Any]]:
        """The entries of one split's shards."""
        return self.content["splits"][split]["shards"]

    def tokenizer(self) -> MixedTokenizer:
        """The tokeniser of the shards.

        Raises:
            ShardError: the tokeniser file is not the one that the shards were made with.
        """
        segmentation = SegmentationConfig.model_validate(self.content["segmentation"])
        tokenizer = MixedTokenizer.load(self.folder / "tokenizer.json", segmentation)
        self.check(tokenizer)
        return tokenizer

    def check(self, tokenizer: MixedTokenizer) -> None:
        """Compare the tokeniser and its segmentation with those of the shards.

        Raises:
            ShardError: they differ.
        """
        for what, ours, theirs in (
            ("tokeniser", tokenizer.hash, self.content["tokenizer_hash"]),
            ("segmentation", segmentation_hash(tokenizer.segmentation), self.content["segmentation_hash"]),
        ):
            if ours != theirs:
                raise ShardError(
                    f"{self.folder}: the shards were made with another {what} ({theirs[:12]}, not {ours[:12]}); "
                    f"prepare the shards anew or use theirs"
                )

    def lengths(self, shard: dict[str, Any]) -> DocumentLengths:
        """The lengths of a shard's documents, from its index.

        Raises:
            ShardError: the index is missing or not the one that was written.
        """
        path = self.folder / f"{shard['name']}.index.npz"
        check_file(path, sha256=shard["index_sha256"])
        with np.load(path, allow_pickle=False) as arrays:
            return DocumentLengths(**{key: arrays[key] for key in _LENGTHS})


def write_manifest(
    folder: Path, tokenizer: MixedTokenizer, splits: dict[str, list[dict[str, Any]]], extra: dict[str, Any]
) -> None:
    """Write the manifest, the last file of a shard folder."""
    totals = ("documents", "blocks", "tokens", "text_bytes", "supervised_bytes", "bytes")
    content = {
        "format": FORMAT,
        "tokenizer_hash": tokenizer.hash,
        "segmentation": tokenizer.segmentation.model_dump(),
        "segmentation_hash": segmentation_hash(tokenizer.segmentation),
        **extra,
        "splits": {
            split: {key: sum(e[key] for e in entries) for key in totals} | {"shards": entries}
            for split, entries in splits.items()
        },
    }
    replace_file(folder / MANIFEST, json.dumps(content, indent=1).encode())


def check_file(path: Path, size: int | None = None, sha256: str | None = None) -> None:
    """Compare a file with the size and hash that were recorded when it was written.

    Raises:
        ShardError: it is missing or differs.
    """
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            raise ShardError(f"{path}: {found} bytes, the manifest says {size}: torn; copy or prepare it anew")
        if sha256 is not None and sha256_of(path) != sha256:
            raise ShardError(f"{path}: its content is not what was written (sha256 differs); copy or prepare it anew")
    except OSError as error:
        raise ShardError(f"{path}: cannot read ({error.strerror}); it belongs to the shards, copy it here") from None
