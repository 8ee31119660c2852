"""Random access to the documents of a shard, memory-mapped."""

import io
import json
import mmap
import tarfile
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.layout import Piece
from data_pipeline.shards import check_file


class ShardReader:
    """Random access to the documents of one shard, memory-mapped.

    Raises:
        ShardError: the tar is missing, torn or not the one that was written.
    """

    def __init__(self, folder: Path, entry: dict[str, Any]):
        self._path = folder / f"{entry['name']}.tar"
        check_file(self._path, entry["bytes"], entry["sha256"])
        with open(self._path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with tarfile.open(self._path) as tar:
            groups: dict[str, dict[str, tuple[int, int]]] = {}
            for info in tar:
                key, _, extension = info.name.partition(".")
                groups.setdefault(key, {})[extension] = (info.offset_data, info.size)
        self._groups = [_ReadMember(self._map, group) for group in groups.values()]
        counts = [len(g.document_blocks) for g in self._groups]
        self._group_ends = np.cumsum(counts)

    def _find(self, document: int) -> tuple["_ReadMember", int]:
        group = int(np.searchsorted(self._group_ends, document, side="right"))
        return self._groups[group], document - int(self._group_ends[group - 1] if group else 0)

    def piece(self, document: int, first_block: int, end_block: int) -> Piece:
        """The blocks `first_block..end_block` of a document."""
        member, i = self._find(document)
        blocks = member.document_block_ends
        start = int(blocks[i])
        first, end = start + first_block, start + end_block
        tokens, chars = member.token_ends, member.char_ends
        return Piece(
            tokens=member.array("tokens.npy")[tokens[first] : tokens[end]].astype(np.int64),
            chars=member.array("chars.npy")[chars[first] : chars[end]],
            block_tokens=np.diff(tokens[first : end + 1]),
            block_bytes=np.diff(chars[first : end + 1]),
            supervised_from=max(int(member.array("prompt_blocks.npy")[i]) - first_block, 0),
            ends_document=end == int(blocks[i + 1]),
        )

    def document(self, document: int) -> tuple[Piece, tuple[str, int]]:
        """A whole document and its origin (file, line)."""
        member, i = self._find(document)
        origin = (member.files[int(member.array("origin_file.npy")[i])], int(member.array("origin_line.npy")[i]))
        return self.piece(document, 0, int(member.document_blocks[i])), origin


class _ReadMember:
    """One member group of an open shard; arrays are views of the mapped file."""

    def __init__(self, data: mmap.mmap, group: dict[str, tuple[int, int]]):
        self._data, self._group = data, group
        self._arrays: dict[str, np.ndarray] = {}
        self.document_blocks = self.array("document_blocks.npy")

    def array(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            offset, size = self._group[name]
            header = io.BytesIO(self._data[offset : offset + min(size, 4096)])
            np.lib.format.read_magic(header)
            shape, _, dtype = np.lib.format.read_array_header_1_0(header)
            self._arrays[name] = np.frombuffer(self._data, dtype, shape[0], offset + header.tell())
        return self._arrays[name]

    @cached_property
    def document_block_ends(self) -> np.ndarray:
        return _ends(self.document_blocks)

    @cached_property
    def token_ends(self) -> np.ndarray:
        return _ends(self.array("block_tokens.npy"))

    @cached_property
    def char_ends(self) -> np.ndarray:
        return _ends(self.array("block_bytes.npy"))

    @cached_property
    def files(self) -> list[str]:
        offset, size = self._group["files.json"]
        return json.loads(self._data[offset : offset + size])


def _ends(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
