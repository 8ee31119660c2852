"""Random access to the documents of a shard, without holding it in memory.

A member group is compared with its recorded sha256 when it is first touched; after that, pieces are read as stretches
of its arrays. Reading never maps the file: a file that is cut short under a reader must be an error, not a crash.
"""

import hashlib
import io
import json
import os
import tarfile
from bisect import bisect_right
from functools import cached_property
from typing import Any

import numpy as np

from data_pipeline.errors import ShardError
from data_pipeline.packing import PieceAddress
from data_pipeline.pieces import Piece
from data_pipeline.shards import read_index
from data_pipeline.storage import Storage

_MEMBERS = ("documents", "blocks", "tokens", "text_bytes", "end", "sha256")


class ShardReader:
    """Random access to the documents of one shard.

    Raises:
        ShardError: the tar or its index is missing, torn or not the one that was written; from any method.
    """

    def __init__(self, storage: Storage, entry: dict[str, Any]):
        name = f"{entry['name']}.tar"
        self._where = storage.describe(name)
        table = read_index(storage, entry, tuple(f"member_{name}" for name in _MEMBERS))
        # Only os.pread reads it, so processes may share it after a fork; it is closed when the reader is forgotten.
        self._file = storage.open(name, entry["bytes"], entry["sha256"], verify=False)
        self._documents, self._blocks, self._tokens, self._bytes = (
            [0, *np.cumsum(table[f"member_{name}"]).tolist()] for name in _MEMBERS[:4]
        )
        self._ends = [0, *table["member_end"].tolist()]
        self._hashes = table["member_sha256"]
        self._groups: dict[int, _Group] = {}

    def read(self, address: PieceAddress) -> Piece:
        """A piece at its address in the row plan."""
        m = self._member_of(address.document)
        group = self._group(m)
        n_blocks, block = address.end_block - address.first_block, address.block_start - self._blocks[m]
        own = address.document - self._documents[m]
        return Piece(
            tokens=group.read("tokens.npy", address.token_start - self._tokens[m], address.tokens),
            chars=group.read("chars.npy", address.byte_start - self._bytes[m], address.bytes),
            block_tokens=group.read("block_tokens.npy", block, n_blocks).astype(np.int32),
            block_bytes=group.read("block_bytes.npy", block, n_blocks).astype(np.int32),
            supervised_from=address.supervised_block - address.first_block,
            ends_document=address.end_block == group.document_blocks[own],
        )

    def piece(self, document: int, first_block: int, end_block: int, supervised_block: int = 0) -> Piece:
        """The blocks `first_block..end_block` of a document, of which those from `supervised_block` on and behind the
        prompt are supervised."""
        m = self._member_of(document)
        group, own = self._group(m), document - self._documents[m]
        start = sum(group.document_blocks[:own])
        tokens = group.read("block_tokens.npy", 0, start + end_block).astype(np.int64)
        sizes = group.read("block_bytes.npy", 0, start + end_block).astype(np.int64)
        before = start + first_block
        prompt = int(group.whole("prompt_blocks.npy")[own])
        address = PieceAddress(
            document=document,
            first_block=first_block,
            end_block=end_block,
            supervised_block=max(prompt, first_block, supervised_block),
            block_start=self._blocks[m] + before,
            token_start=self._tokens[m] + int(tokens[:before].sum()),
            byte_start=self._bytes[m] + int(sizes[:before].sum()),
            tokens=int(tokens[before:].sum()),
            bytes=int(sizes[before:].sum()),
        )
        return self.read(address)

    def document(self, document: int) -> tuple[Piece, tuple[str, int]]:
        """A whole document and its origin (file, line)."""
        m = self._member_of(document)
        own = document - self._documents[m]
        return self.piece(document, 0, self._group(m).document_blocks[own]), self.origin(document)

    def origin(self, document: int) -> tuple[str, int]:
        """The file that a document comes from, and its line or record there, 0 for a whole file."""
        m = self._member_of(document)
        group, own = self._group(m), document - self._documents[m]
        return group.files[int(group.whole("origin_file.npy")[own])], int(group.whole("origin_line.npy")[own])

    def _member_of(self, document: int) -> int:
        return bisect_right(self._documents, document) - 1

    def _group(self, m: int) -> "_Group":
        if m not in self._groups:
            start, end = self._ends[m], self._ends[m + 1]
            data = _read(self._file.fileno(), start, end - start, self._where)
            if hashlib.sha256(data).digest() != self._hashes[m].tobytes():
                raise ShardError(
                    f"{self._where}: its content is not what was written (sha256 differs between bytes {start} and "
                    f"{end}); copy or prepare it anew"
                )
            self._groups[m] = _Group(self._file.fileno(), self._where, start, data)
        return self._groups[m]


class _Group:
    """One member group of an open shard: where its arrays stand in the file. `data` are its bytes, not kept."""

    def __init__(self, fd: int, where: str, start: int, data: bytes):
        self._fd, self._where = fd, where
        self._arrays: dict[str, tuple[int, int, np.dtype]] = {}  # first byte in the file, elements, type
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for info in tar:
                name, at = info.name.partition(".")[2], info.offset_data
                if name == "files.json":
                    self._files = (start + at, info.size)
                    continue
                header = io.BytesIO(data[at : at + min(info.size, 4096)])
                np.lib.format.read_magic(header)
                shape, _, dtype = np.lib.format.read_array_header_1_0(header)
                self._arrays[name] = (start + at + header.tell(), shape[0], dtype)

    def read(self, name: str, first: int, count: int) -> np.ndarray:
        """Elements `first .. first + count` of an array, read-only."""
        at, _, dtype = self._arrays[name]
        data = _read(self._fd, at + first * dtype.itemsize, count * dtype.itemsize, self._where)
        return np.frombuffer(data, dtype)

    def whole(self, name: str) -> np.ndarray:
        return self.read(name, 0, self._arrays[name][1])

    @cached_property
    def document_blocks(self) -> list[int]:
        return self.whole("document_blocks.npy").tolist()

    @cached_property
    def files(self) -> list[str]:
        return json.loads(_read(self._fd, *self._files, self._where))


def _read(fd: int, start: int, size: int, where: str) -> bytes:
    try:
        data = os.pread(fd, size, start)
    except OSError as error:
        raise ShardError(f"{where}: cannot read ({error.strerror}); copy or prepare it anew") from None
    if len(data) != size:
        raise ShardError(f"{where}: torn while it was read; copy or prepare it anew")
    return data
