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
    origin_line.npy      uint32, its line or record there, from 1, or 0 for a whole file

The index repeats the lengths of a whole shard, so that rows are planned without reading text, and says of each member
group where its bytes end in the tar, their sha256, and how many documents, blocks, tokens and bytes of text it holds,
so that a reader finds and checks what it needs without reading the rest. The manifest is written last: a folder
without one holds no shards.
"""

import hashlib
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from data_pipeline.corpus import Document
from data_pipeline.encoding import BatchEncoder
from data_pipeline.errors import ShardError, TokenizerError
from data_pipeline.files import parse_description, replace_file, sha256_of, whole_file, write_npz
from data_pipeline.mixing import Mix
from data_pipeline.packing import DocumentLengths
from data_pipeline.section import Section
from data_pipeline.segmentation import SegmentationConfig, segmentation_hash
from data_pipeline.storage import Storage
from data_pipeline.tokenizer import MixedTokenizer

FORMAT = 2
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
_MEMBER_BYTES = 1 << 20
_MEMBER_DOCUMENTS = 4096
LENGTHS = ("document_blocks", "prompt_blocks", "block_tokens", "block_bytes")
_TAR_BLOCK = 512
COUNTS = (
    "documents",
    "blocks",
    "tokens",
    "text_bytes",
    "supervised_bytes",
    "one_token_blocks",
    "bytes",
    "index_bytes",
)


class DataConfig(Section):
    """Shards, rows and their order."""

    shards: str = Field(description="the folder of the shards, or where it was copied to: a path, or an fsspec URL")
    storage_options: dict[str, Any] = Field(default_factory=dict, description="of the URL's client: endpoint_url ...")
    cache: str | None = Field(None, description="local folder for shards that are read from a URL")
    cache_bytes: int = Field(50_000_000_000, ge=1, description="size of the cache, at most, on each machine")
    shard_bytes: int = Field(64_000_000, ge=1, description="text of one shard, about, in bytes")
    row_tokens: int = Field(ge=2, description="token slots of a row (T)")
    row_chars: int = Field(ge=2, description="char slots of a row (C)")
    overlap_tokens: int = Field(
        0, ge=0, description="context that a later piece of a long document repeats, in tokens; half a row at most"
    )
    lanes: int = Field(8, ge=1, description="independent streams of rows; divides the global batch, ranks divide it")
    seed: int = Field(1, ge=0, description="seed of the order of the rows")
    workers: int = Field(1, ge=0, description="loader processes of each rank; 0 loads in the training process")
    prefetch_steps: int = Field(4, ge=1, description="steps that each loader process reads ahead")
    mix: Mix = Field([], description="weights of the sources by stage; none: all shards are one pool")
    on_bad_shard: Literal["stop", "quarantine"] = Field(
        "stop", description="what training does about a shard that cannot be read: stop, or leave its rows empty"
    )
    max_quarantined_shards: int = Field(8, ge=1, description="with more it is the disk or the store: training stops")


@dataclass
class _Member:
    """Documents gathered for one member group, and their text in bytes, about."""

    documents: list[Document] = field(default_factory=list)
    text_bytes: int = 0


class ShardWriter:
    """Writes the shards of one split, each whole or not at all.

    Args:
        folder: the shard folder. split: a folder in it.
        shard_bytes: text of one shard, about; a shard ends with the document that fills it.
        prefix: names of the shards begin with it. source: name of the source of all documents.
        encoder: of the tokeniser; writers that share one share what it has learnt. None: one of its own.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        tokenizer: MixedTokenizer,
        shard_bytes: int,
        prefix: str = "shard",
        source: str = "",
        encoder: BatchEncoder | None = None,
    ):
        self._folder, self._split, self._prefix, self._source = folder, split, prefix, source
        self._shard_bytes = shard_bytes
        self._member_bytes = min(_MEMBER_BYTES, shard_bytes)
        self._token_type = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        self._encoder = encoder or BatchEncoder(tokenizer)
        self._member = _Member()
        self._members: list[dict[str, Any]] = []
        self._members_bytes = 0
        self.entries: list[dict[str, Any]] = []

    def write(self, document: Document) -> None:
        """Add a document."""
        member = self._member
        member.documents.append(document)
        member.text_bytes += len(document.text) + len(document.prompt)
        if member.text_bytes >= self._member_bytes or len(member.documents) >= _MEMBER_DOCUMENTS:
            self._end_member()
            if self._members_bytes >= self._shard_bytes:
                self._end_shard()

    def close(self) -> list[dict[str, Any]]:
        """Write what is left; the manifest's entries of all shards."""
        self._end_member()
        self._end_shard()
        return self.entries

    def _end_member(self) -> None:
        documents = self._member.documents
        if not documents:
            return
        encoded = self._encoder.encode([d.prompt for d in documents], [d.text for d in documents])
        arrays = {f"{name}.npy": getattr(encoded, name) for name in ("chars", *LENGTHS)}
        arrays["tokens.npy"] = encoded.tokens.astype(self._token_type)
        self._members.append(arrays | _origins([d.origin for d in documents]))
        self._members_bytes += len(encoded.chars)
        self._member = _Member()

    def _end_shard(self) -> None:
        if not self._members:
            return
        import webdataset  # only writing needs it, so that reading and generation work without

        name = f"{self._prefix}-{len(self.entries):06d}"
        path = self._folder / self._split / f"{name}.tar"
        with whole_file(path) as file, webdataset.TarWriter(file, mtime=0) as tar:
            for number, arrays in enumerate(self._members):
                tar.write({"__key__": f"{number:06d}"} | arrays)
        lengths = {key: np.concatenate([m[f"{key}.npy"] for m in self._members]) for key in LENGTHS}
        ends, hashes, sha256 = _member_hashes(path)
        counts = {
            "member_documents": [len(m["document_blocks.npy"]) for m in self._members],
            "member_blocks": [len(m["block_bytes.npy"]) for m in self._members],
            "member_tokens": [len(m["tokens.npy"]) for m in self._members],
            "member_text_bytes": [len(m["chars.npy"]) for m in self._members],
            "member_end": ends,
        }
        index = self._folder / self._split / f"{name}.index.npz"
        with whole_file(index) as file:
            write_npz(file, lengths | {k: np.array(v, np.int64) for k, v in counts.items()} | {"member_sha256": hashes})
        self.entries.append(
            {
                "name": f"{self._split}/{name}",
                "source": self._source,
                "bytes": path.stat().st_size,
                "sha256": sha256,
                "index_bytes": index.stat().st_size,
                "index_sha256": sha256_of(index),
                "documents": sum(counts["member_documents"]),
                "blocks": sum(counts["member_blocks"]),
                "tokens": sum(counts["member_tokens"]),
                "text_bytes": sum(counts["member_text_bytes"]),
                "supervised_bytes": _supervised_bytes(**lengths),
                "one_token_blocks": int((lengths["block_tokens"] == 1).sum()),
            }
        )
        self._members, self._members_bytes = [], 0


def _origins(origins: list[tuple[str, int]]) -> dict[str, Any]:
    files = {name: i for i, name in enumerate(dict.fromkeys(file for file, _ in origins))}
    return {
        "files.json": list(files),
        "origin_file.npy": np.array([files[file] for file, _ in origins], dtype=np.uint32),
        "origin_line.npy": np.array([line for _, line in origins], dtype=np.uint32),
    }


def _supervised_bytes(
    document_blocks: np.ndarray, prompt_blocks: np.ndarray, block_bytes: np.ndarray, **_: np.ndarray
) -> int:
    ends = np.concatenate([[0], np.cumsum(block_bytes, dtype=np.int64)])
    last = np.cumsum(document_blocks, dtype=np.int64)
    return int((ends[last] - ends[last - document_blocks + prompt_blocks]).sum())


def _member_hashes(path: Path) -> tuple[list[int], np.ndarray, str]:
    """Where each member group of a tar ends, the sha256 of each (n, 32), and that of the whole file."""
    ends: dict[str, int] = {}
    with tarfile.open(path) as tar:
        for info in tar:
            ends[info.name.partition(".")[0]] = info.offset_data + -(-info.size // _TAR_BLOCK) * _TAR_BLOCK
    whole, hashes, start = hashlib.sha256(), [], 0
    with open(path, "rb") as file:
        for end in ends.values():
            data = file.read(end - start)
            whole.update(data)
            hashes.append(hashlib.sha256(data).digest())
            start = end
        whole.update(file.read())
    return list(ends.values()), np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32), whole.hexdigest()


@dataclass(frozen=True)
class Manifest:
    """What a shard folder holds. `content` is the manifest file as it is; `hash` is that of its bytes."""

    storage: Storage
    content: dict[str, Any]
    hash: str

    @classmethod
    def load(cls, folder: "str | Path | Storage") -> "Manifest":
        """Read a folder's manifest.

        Raises:
            ShardError: there is none, or it cannot be read.
        """
        storage = folder if isinstance(folder, Storage) else Storage(folder)
        where = storage.describe(MANIFEST)
        try:
            data = storage.read(MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            raise ShardError(
                f"{storage.location}: no {MANIFEST}, so no shards here; run `tidal prepare` first"
            ) from None
        except OSError as error:
            raise ShardError(f"{where}: cannot read ({error}); prepare the shards anew") from None
        required = {"splits", "segmentation", "segmentation_hash", "tokenizer_hash", "files"}
        content = parse_description(data, where, FORMAT, required, ShardError, "prepare the shards anew")
        return cls(storage, content, hashlib.sha256(data).hexdigest())

    @classmethod
    def of(cls, data: DataConfig) -> "Manifest":
        """The manifest of the configured shards.

        Raises:
            ShardError: there is none, or it cannot be read.
        """
        return cls.load(Storage(data.shards, data.cache, data.cache_bytes, data.storage_options))

    @property
    def where(self) -> str:
        """Path or URL of the folder."""
        return self.storage.location

    @property
    def folder(self) -> Path:
        """The folder of shards that lie on a disk."""
        return Path(self.storage.location)

    def shards(self, split: str) -> list[dict[str, Any]]:
        """The entries of one split's shards."""
        return self.content["splits"][split]["shards"]

    def sources(self, split: str) -> list[str]:
        """The source of each of a split's shards."""
        return [entry["source"] for entry in self.shards(split)]

    def tokenizer(self) -> MixedTokenizer:
        """The tokeniser of the shards.

        Raises:
            ShardError: the tokeniser file is not the one that the shards were made with.
        """
        segmentation = SegmentationConfig.model_validate(self.content["segmentation"])
        name = "tokenizer.json"
        try:
            data = self.storage.read(name)
        except OSError as error:
            raise TokenizerError(f"{self.storage.describe(name)}: cannot load the tokeniser ({error})") from None
        tokenizer = MixedTokenizer.parse(data, self.storage.describe(name), segmentation)
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
                    f"{self.where}: the shards were made with another {what} ({theirs[:12]}, not {ours[:12]}); "
                    f"prepare the shards anew or use theirs"
                )

    def lengths(self, shard: dict[str, Any]) -> DocumentLengths:
        """The lengths of a shard's documents, from its index.

        Raises:
            ShardError: the index is missing or not the one that was written.
        """
        return read_lengths(self.storage, shard)


def read_lengths(storage: Storage, shard: dict[str, Any]) -> DocumentLengths:
    """The lengths of a shard's documents, from its index; errors as `read_index`."""
    return DocumentLengths(**read_index(storage, shard, LENGTHS))


def read_index(storage: Storage, shard: dict[str, Any], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Some arrays of a shard's index.

    Raises:
        ShardError: the index is missing or not the one that was written.
    """
    file = storage.open(f"{shard['name']}.index.npz", shard["index_bytes"], shard["index_sha256"])
    with file, np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in names}


def seal(manifest_hash: str) -> bytes:
    """The content of the file beside the manifest that says what it was, as `sha256sum --check` reads it."""
    return f"{manifest_hash}  {MANIFEST}\n".encode()


def write_manifest(
    folder: Path,
    tokenizer: MixedTokenizer,
    splits: dict[str, list[dict[str, Any]]],
    files: dict[str, dict[str, Any]],
    extra: dict[str, Any],
) -> None:
    """Write the manifest, the last file of a shard folder but for row plans.

    Args:
        splits: the entries of each split's shards. files: size and sha256 of every other file, by name.
        extra: further keys.
    """
    content = {
        "format": FORMAT,
        "tokenizer_hash": tokenizer.hash,
        "segmentation": tokenizer.segmentation.model_dump(),
        "segmentation_hash": segmentation_hash(tokenizer.segmentation),
        "files": files,
        **extra,
        "splits": {
            split: {key: sum(e[key] for e in entries) for key in COUNTS} | {"shards": entries}
            for split, entries in splits.items()
        },
    }
    data = json.dumps(content, indent=1).encode()
    replace_file(folder / f"{MANIFEST}.sha256", seal(hashlib.sha256(data).hexdigest()))
    replace_file(folder / MANIFEST, data)
