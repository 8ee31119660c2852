"""The files of a source, on disk or behind any fsspec URL: listed in one order, opened, decompressed."""

import gzip
import io
import os
import sysconfig
import zlib
from collections.abc import Iterator
from fnmatch import fnmatch, fnmatchcase
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from data_pipeline.errors import CorpusError, one_line

if TYPE_CHECKING:
    from data_pipeline.corpus import SourceConfig

_BUFFER_BYTES = 1 << 20
# Botocore's oldest mode of retrying is the only one whose attempts are not also bounded by a budget that a client's
# requests share, which a busy store would use up.
_S3 = ("s3://", "s3a://")
_S3_RETRIES = {"mode": "legacy", "max_attempts": 8}


class BrokenFileError(Exception):
    """A file's content breaks off or is not what its name says. The text says how.

    Attributes:
        number: of the record where it breaks; none: the one after those that were read.
    """

    number: int | None = None


def is_remote(path: str) -> bool:
    """Whether a path is an fsspec URL."""
    return "://" in path


def filesystem_of(source: "SourceConfig") -> Any:
    """The fsspec client of a source. Clients do not survive a fork: a process asks for its own.

    Raises:
        CorpusError: there is none for the URL's protocol, or its options are wrong.
    """
    import fsspec

    protocol = source.path.partition("://")[0] if is_remote(source.path) else "file"
    options: dict[str, Any] = dict(source.storage_options)
    if source.path.startswith(_S3):
        options["config_kwargs"] = {"retries": _S3_RETRIES} | options.get("config_kwargs", {})
    try:
        return fsspec.url_to_fs(source.path, **options)[0] if protocol != "file" else fsspec.filesystem("file")
    except Exception as error:  # each client raises what its libraries raise
        raise CorpusError(
            f"{source.path}: cannot be opened ({one_line(error)}); check corpus.sources and its storage_options"
        ) from None


def list_source(source: "SourceConfig") -> list[tuple[str, int]]:
    """Path or URL and size in bytes of every file of a source, sorted by path.

    Raises:
        CorpusError: there are none, or they cannot be listed.
    """
    path = source.path.replace("{stdlib}", sysconfig.get_path("stdlib")).removeprefix("file://")
    try:
        found = sorted(_files(_RemoteTree(source) if is_remote(path) else _LocalTree(), path))
    except CorpusError:
        raise
    except Exception as error:
        raise CorpusError(f"{source.path}: cannot list ({one_line(error)}); check corpus.sources") from None
    kept = [(p, size) for p, size in found if not any(fnmatch(p, e) for e in source.exclude)]
    if not kept:
        why = "there is no such file" if not found else "corpus.sources.exclude leaves out every file"
        raise CorpusError(f"{source.path}: {why}; check corpus.sources")
    return kept


class _Tree(Protocol):
    """What listing needs to know of a file system."""

    def info(self, path: str) -> tuple[str, int] | None:
        """Whether there is a "file" or a "directory" of exactly this name, and its bytes."""

    def walk(self, folder: str, depth: int | None) -> Iterator[tuple[str, int]]:
        """All files below a folder, at most `depth` levels down: their path from there, and their bytes."""


class _LocalTree:
    def info(self, path: str) -> tuple[str, int] | None:
        if os.path.isfile(path):
            return "file", os.stat(path).st_size
        return ("directory", 0) if os.path.isdir(path) else None

    def walk(self, folder: str, depth: int | None) -> Iterator[tuple[str, int]]:
        root = folder or "."
        for parent, folders, names in os.walk(root, onerror=_raise, followlinks=True) if os.path.isdir(root) else ():
            inner = os.path.relpath(parent, root).split("/") if parent != root else []
            if depth is not None and len(inner) + 1 >= depth:
                folders.clear()
            for name in names:
                info = self.info(os.path.join(parent, name))
                if info and info[0] == "file":
                    yield "/".join([*inner, name]), info[1]


class _RemoteTree:
    def __init__(self, source: "SourceConfig"):
        self._fs = filesystem_of(source)
        self._fs.invalidate_cache()
        # One request for a thousand files, whatever their folders.
        self._lists_flat = source.path.startswith(_S3)

    def info(self, path: str) -> tuple[str, int] | None:
        try:
            info = self._fs.info(path)
        except FileNotFoundError:
            return None
        return info["type"], int(info["size"] or 0)

    def walk(self, folder: str, depth: int | None) -> Iterator[tuple[str, int]]:
        if self.info(folder) is None:
            return
        root = self._fs._strip_protocol(folder).rstrip("/") + "/"
        for name, info in self._find(folder, depth):
            # A store may list a marker of the folder itself.
            if info["type"] == "file" and name.startswith(root) and not name.endswith("/"):
                yield name[len(root) :], int(info["size"] or 0)

    def _find(self, folder: str, depth: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
        if depth is None and self._lists_flat:
            yield from self._fs.find(folder, detail=True).items()
            return
        # Left to itself, fsspec takes a folder that cannot be listed for an empty one.
        for _, _, files in self._fs.walk(folder, maxdepth=depth, detail=True, on_error="raise"):
            yield from ((info["name"], info) for info in files.values())


def _files(tree: _Tree, path: str) -> Iterator[tuple[str, int]]:
    """The file that a path is, those of the folder that it is, or those that it matches as a glob."""
    info = tree.info(path)
    if info and info[0] == "file":
        yield path, info[1]
        return
    folder, pattern = (path.rstrip("/") or "/", ["**"]) if info else _split_glob(path)
    depth = None if "**" in pattern else len(pattern)
    for below, size in tree.walk(folder, depth) if pattern else ():
        if _matches(below.split("/"), pattern):
            yield (f"{folder.rstrip('/')}/{below}" if folder else below), size


def _split_glob(path: str) -> tuple[str, list[str]]:
    """The folder that a glob starts from, and its components below; none where it is not a glob."""
    protocol, separator, rest = path.rpartition("://")
    parts = rest.split("/")
    first = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), len(parts))
    folder = "/".join(parts[:first])
    return protocol + separator + (folder or "/" * (first > 0)), [part for part in parts[first:] if part]


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether the components of a path match those of a glob; a leading dot must be written out."""
    if not pattern:
        return not parts
    head, *rest = pattern
    if head == "**":
        shown = next((i for i, part in enumerate(parts) if part.startswith(".")), len(parts))
        if not rest:
            return shown == len(parts)
        return any(_matches(parts[i:], rest) for i in range(shown + 1))
    if not parts or (parts[0].startswith(".") and not head.startswith(".")):
        return False
    return fnmatchcase(parts[0], head) and _matches(parts[1:], rest)


def open_source(file: Any, path: str, size: int) -> BinaryIO:
    """A buffered stream over an open binary file, decompressed if its name ends in .gz or .zst.

    Reading raises CorpusError where the file cannot be read, and BrokenFileError where it breaks off.
    """
    stream: io.RawIOBase = _Readable(file, path)
    if path.endswith((".gz", ".zst")):
        # Both libraries take a file of no bytes for a whole one.
        if not size:
            file.close()
            raise BrokenFileError("an empty file is not a compressed one")
        inner = io.BufferedReader(stream, _BUFFER_BYTES)
        stream = _Gunzipped(inner) if path.endswith(".gz") else _Unzstd(inner)
    return io.BufferedReader(stream, _BUFFER_BYTES)


class _Readable(io.RawIOBase):
    """A file whose failures to be read are the user's to mend, told apart from broken content."""

    def __init__(self, file: Any, path: str):
        self._file = file
        self._path = path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._file.readinto(buffer)
        except Exception as error:  # clients raise what their libraries raise
            raise cannot_read(self._path, error) from None

    def readall(self) -> bytes:
        try:
            return self._file.read()
        except Exception as error:
            raise cannot_read(self._path, error) from None

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _Gunzipped(io.RawIOBase):
    """What gzip members hold."""

    def __init__(self, compressed: BinaryIO):
        self._compressed = compressed
        self._file = gzip.GzipFile(fileobj=compressed)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            # One step of decompression: of several, a tear would also take what came before it.
            data = self._file.read1(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise BrokenFileError(f"gzip: {error}") from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._compressed.close()
        super().close()


class _Unzstd(io.RawIOBase):
    """What Zstandard frames hold, all of them to their ends: a stream reader of the library takes a torn frame for a
    whole one."""

    _INPUT_BYTES = 1 << 16

    def __init__(self, compressed: BinaryIO):
        import zstandard

        self._compressed = compressed
        self._library = zstandard
        self._frame = self._new_frame()
        self._input = b""
        self._output = memoryview(b"")

    def _new_frame(self) -> Any:
        return self._library.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            data = self._input or self._compressed.read(self._INPUT_BYTES)
            if not data:
                if not self._frame.eof:
                    raise BrokenFileError("zstd: the last frame breaks off")
                return 0
            try:
                if self._frame.eof:
                    self._frame = self._new_frame()
                self._output = memoryview(self._frame.decompress(data))
            except self._library.ZstdError as error:
                raise BrokenFileError(one_line(error)) from None
            self._input = self._frame.unused_data
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def close(self) -> None:
        self._compressed.close()
        super().close()


def cannot_read(path: str, error: Exception) -> CorpusError:
    """The error for a file that is there and cannot be read."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
    return CorpusError(f"{path}: cannot read ({reason}); check the file and its permissions")


def _raise(error: OSError) -> None:
    raise error
