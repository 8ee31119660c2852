"""Files that `torch.save` wrote, read without running what is in them and without the memory that they would take.

Such a file is a zip archive whose records are not compressed: `data.pkl`, a pickle of everything but the tensors'
elements, and `data/KEY`, the bytes of each storage. Here the pickle's classes become inert stubs, whatever they are, so
DeepSpeed need not be installed and a foreign file can do nothing; tensors become `StoredTensor`s, read when asked for.
"""

import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tidal_dist.errors import CheckpointError

_REMEDY = "use another checkpoint"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field, which precede the bytes
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        start: the first element's byte in the file. storage: names what it may share with other tensors of the file.
        is_contiguous: whether its elements stand there in order.
    """

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    storage: str
    is_contiguous: bool

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def read(self, first: int, count: int) -> torch.Tensor:
        """Elements `first .. first + count` of the flattened tensor, (count,).

        Raises:
            CheckpointError: they cannot be read.
        """
        if not self.is_contiguous or not 0 <= first <= first + count <= self.numel:
            raise CheckpointError(f"{self.path}: a tensor is not laid out as DeepSpeed writes it; {_REMEDY}")
        size = self.dtype.itemsize
        data = torch.empty(count * size, dtype=torch.uint8)
        read_into(self.path, data, self.start + first * size)
        return data.view(self.dtype)


def read_into(path: Path, data: torch.Tensor, start: int) -> None:
    """Fill `data` (n,) uint8 with the bytes of a file from `start` on.

    Raises:
        CheckpointError: they cannot be read.
    """
    view = memoryview(data.numpy().data)
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while view:
                count = os.preadv(descriptor, [view], start)
                if not count:
                    raise CheckpointError(f"{path}: torn; {_REMEDY}")
                view, start = view[count:], start + count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read ({error.strerror}); {_REMEDY}") from None


class Stub:
    """What stands for an object of any class that is not needed: it keeps what it was made of, and does nothing.

    Attributes:
        arguments: of its making. state: what its fields were, if they were stored.
    """

    def __new__(cls, *arguments: Any, **_: Any) -> "Stub":
        """Keep what the object would have been made of."""
        stub = super().__new__(cls)
        stub.arguments, stub.state = arguments, {}
        return stub

    def __init__(self, *_: Any, **__: Any):
        self.arguments: tuple
        self.state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, _: Any) -> None:
        """An item of what was a list."""

    def extend(self, _: Any) -> None:
        """Items of what was a list."""

    def add(self, _: Any) -> None:
        """An item of what was a set."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """An item of what was a dict."""


def read_torch_file(path: Path) -> Any:
    """What `torch.save` wrote to a file, tensors as `StoredTensor`, objects of unknown classes as `Stub`.

    Raises:
        CheckpointError: the file is missing, torn, or not one that `torch.save` wrote.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            records = {info.filename: info for info in archive.infolist()}
            name = next((n for n in records if n.endswith("/data.pkl")), None)
            if name is None:
                raise CheckpointError(f"{path}: not a file that torch.save wrote; {_REMEDY}")
            folder = name.removesuffix("data.pkl")
            order = records.get(f"{folder}byteorder")
            if order is not None and archive.read(order) != b"little":
                raise CheckpointError(f"{path}: written on a machine with another byte order; {_REMEDY}")
            with archive.open(name) as data:
                return _Unpickler(data, path, lambda key: _record(file, records[f"{folder}data/{key}"])).load()
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read ({error.strerror}); {_REMEDY}") from None
    except Exception as error:  # a pickle that is no pickle raises anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{path}: torn, or not a file that torch.save wrote ({reason}); {_REMEDY}") from None


def _record(file: Any, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where the bytes of a record stand in the file, and how many they are."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("a storage is compressed")
    file.seek(info.header_offset)
    signature, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise ValueError("no storage where the archive says that there is one")
    return info.header_offset + _LOCAL_HEADER.size + name + extra, info.file_size


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    start: int
    numel: int


class _Unpickler(pickle.Unpickler):
    """Builds containers and tensors; knows no function that could do anything else."""

    def __init__(self, data: Any, path: Path, find: Callable[[str], tuple[int, int]]):
        super().__init__(data, encoding="utf-8")
        self._path, self._find = path, find
        # Bound methods, so that a pickle cannot reach a module's own functions to change them.
        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
        }

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global of the pickle."""
        if (module, name) in self._known:
            return self._known[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        return type(name, (Stub,), {})

    def persistent_load(self, identity: Any) -> _Storage:
        """A storage: ("storage", type, key, device, number of elements)."""
        _, dtype, key, _, numel = identity
        start, size = self._find(str(key))
        if size != numel * dtype.itemsize:
            raise ValueError(f"storage {key} has {size} bytes instead of {numel * dtype.itemsize}")
        return _Storage(str(key), dtype, start, numel)

    def _tensor(self, storage: _Storage, offset: int, shape: tuple, stride: tuple, *_: Any) -> StoredTensor:
        expected, steps = 1, []
        for size in reversed(shape):
            steps.append(expected)
            expected *= size
        # Where a dimension has one element, or there is no element at all, its stride means nothing.
        is_contiguous = not expected or all(
            size == 1 or step == found
            for size, step, found in zip(reversed(shape), steps, reversed(stride), strict=True)
        )
        if is_contiguous and offset + expected > storage.numel:
            raise ValueError(f"a tensor of {expected} elements from {offset} on in a storage of {storage.numel}")
        start = storage.start + offset * storage.dtype.itemsize
        return StoredTensor(self._path, start, storage.dtype, tuple(shape), storage.key, is_contiguous)

    def _parameter(self, tensor: StoredTensor, *_: Any) -> StoredTensor:
        return tensor
