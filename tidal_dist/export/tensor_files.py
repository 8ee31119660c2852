"""Safetensors files: written in one go from weights that are read piece by piece, and mapped into memory.

A file is 8 bytes, the length of the header; the header, JSON of each tensor's type, shape and bytes; and the bytes.
"""

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from tidal_dist.errors import ExportError
from tidal_dist.export.weights import Weights

T = TypeVar("T")
Convert = Callable[[str, torch.Tensor], torch.Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}
_LENGTH = struct.Struct("<Q")
_LARGEST_HEADER = 100_000_000  # as the safetensors library has it
_DIRTY_BYTES = 1 << 26  # written before the disk is asked to take them


@dataclass(frozen=True)
class Written:
    """A file as it was written."""

    name: str
    bytes: int
    sha256: str


def shares(weights: Weights, itemsize: int, max_bytes: int) -> list[list[str]]:
    """The names of the weights of each file: in order, as many as fit in `max_bytes`, one at least."""
    files: list[list[str]] = [[]]
    size = 0
    for name, shape in weights.shapes.items():
        own = math.prod(shape) * itemsize
        if files[-1] and size + own > max_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += own
    return files


def file_names(count: int) -> list[str]:
    """What the files of a model are called, as other libraries call them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_tensors(path: Path, weights: Weights, names: Sequence[str], dtype: torch.dtype, convert: Convert) -> Written:
    """Write some of the weights to a file, and put it on the disk; hashed on the way.

    Args:
        convert: makes pieces of a weight (n,) float32 into what is written.

    Raises:
        OSError: the disk refuses. UserError: what reading raises.
    """
    sha256, size = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:

        def write(data: Any) -> None:
            nonlocal size
            view = memoryview(data)
            sha256.update(view)
            while view:
                view = view[file.write(view) :]
            before, size = size, size + memoryview(data).nbytes
            if before // _DIRTY_BYTES != size // _DIRTY_BYTES:
                # Little by little: a disk that gets everything at the end would be waited for then.
                os.fdatasync(file.fileno())

        write(_header(weights.shapes, names, dtype))
        pieces = ((name, piece) for name in names for piece in weights.pieces(name))
        for of_weight, piece in _one_ahead(pieces):
            write(convert(of_weight, piece).view(torch.uint8).numpy())
        os.fsync(file.fileno())
    return Written(path.name, size, sha256.hexdigest())


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each read while the one before it is being written."""
    with ThreadPoolExecutor(1) as reader:
        future = reader.submit(next, items, None)
        while (item := future.result()) is not None:
            future = reader.submit(next, items, None)
            yield item


def _header(shapes: Mapping[str, tuple[int, ...]], names: Sequence[str], dtype: torch.dtype) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        end = start + math.prod(shapes[name]) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors stand at whole numbers of words
    return _LENGTH.pack(len(text)) + text


@dataclass(frozen=True)
class Tensors:
    """The tensors of files that are mapped into memory: what is not touched takes none.

    Attributes:
        tensors: by name.
    """

    tensors: dict[str, torch.Tensor]
    _maps: tuple[mmap.mmap, ...]

    def release(self) -> None:
        """Give the memory back that touching them has taken; they are read again when they are touched again."""
        for memory in self._maps:
            memory.madvise(mmap.MADV_DONTNEED)


def map_tensors(paths: Iterable[Path]) -> Tensors:
    """Map all tensors of safetensors files.

    Raises:
        ExportError: a file is missing, torn, or not what the format says; or two hold a tensor of one name.
    """
    tensors: dict[str, torch.Tensor] = {}
    maps = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                # Private: to write to a tensor is allowed, and changes no file.
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            found = _tensors(memory)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise ExportError(f"{path}: cannot read ({error}); export the checkpoint anew") from None
        if twice := tensors.keys() & found.keys():
            raise ExportError(f"{path}: holds {min(twice)}, as another file does; export the checkpoint anew")
        tensors |= found
        maps.append(memory)
    return Tensors(tensors, tuple(maps))


def _tensors(memory: mmap.mmap) -> dict[str, torch.Tensor]:
    (length,) = _LENGTH.unpack(memory[: _LENGTH.size])
    start = _LENGTH.size + length
    if not length <= _LARGEST_HEADER or start > len(memory):
        raise ValueError("torn, or not safetensors")
    entries = json.loads(memory[_LENGTH.size : start])
    entries.pop("__metadata__", None)
    tensors, reached = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        (first, end), dtype = entry["data_offsets"], _TYPES[entry["dtype"]]
        count = math.prod(entry["shape"])
        if first != reached or end - first != count * dtype.itemsize or start + end > len(memory):
            raise ValueError(f"torn: {name}")
        tensors[name] = torch.frombuffer(memory, dtype=dtype, count=count, offset=start + first).view(entry["shape"])
        reached = end
    if start + reached != len(memory):
        raise ValueError("torn: bytes that belong to no tensor")
    return tensors
