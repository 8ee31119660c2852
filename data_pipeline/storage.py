"""Where shards live: a local or shared folder, or an object store behind a bounded local cache.

Object stores are reached through fsspec (`s3://bucket/folder`, `gs://...`). A process opens its own client, since those
do not survive a fork. What is fetched is compared with its recorded sha256 before it enters the cache; the file that
was not used for the longest time leaves it first.
"""

import fcntl
import hashlib
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from data_pipeline.errors import ShardError
from data_pipeline.files import replace_file, sha256_of, whole_file

_ATTEMPTS = 6
_FIRST_PAUSE_SECONDS = 0.2  # doubles with every attempt, so that a store has about six seconds to recover
T = TypeVar("T")


class Storage:
    """A folder of files that are written once and read often.

    Args:
        location: a path, or an fsspec URL.
        cache: local folder for what is fetched from a URL. cache_bytes: its size, at most, beside the newest file.
        options: passed to the fsspec client, such as `endpoint_url`.
    """

    def __init__(
        self,
        location: str | Path,
        cache: str | Path | None = None,
        cache_bytes: int = 50_000_000_000,
        options: dict[str, Any] | None = None,
    ):
        self.location = str(location).rstrip("/") or "/"
        self.is_remote = "://" in self.location
        self._cache = Path(cache) if cache else None
        self._cache_bytes = cache_bytes
        self._options = options or {}
        self._client: tuple[int, Any, str] | None = None

    def describe(self, name: str) -> str:
        """Path or URL of a file, for messages."""
        return f"{self.location}/{name}" if self.is_remote else str(Path(self.location) / name)

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: there is none. OSError: it cannot be read, also after several attempts.
        """
        if not self.is_remote:
            return (Path(self.location) / name).read_bytes()
        return self._retried(lambda fs, root: fs.cat_file(f"{root}/{name}"))

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        if not self.is_remote:
            return (Path(self.location) / name).exists()
        return self._retried(lambda fs, root: fs.exists(f"{root}/{name}"))

    def files(self) -> list[str]:
        """The names of all files below the folder, sorted."""
        if not self.is_remote:
            root = Path(self.location)
            return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        found = self._retried(lambda fs, root: [path[len(root) + 1 :] for path in fs.find(root)])
        return sorted(found)

    def size_and_sha256(self, name: str) -> tuple[int, str]:
        """Size and hex sha256 of a file's content.

        Raises:
            OSError: it is not there or cannot be read.
        """
        if not self.is_remote:
            path = Path(self.location) / name
            return path.stat().st_size, sha256_of(path)
        return self._retried(lambda fs, root: _size_and_sha256(fs, f"{root}/{name}"))

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        if self.is_remote:
            self._retried(lambda fs, root: fs.pipe_file(f"{root}/{name}", data))
        else:
            replace_file(Path(self.location) / name, data)

    def open(self, name: str, size: int, sha256: str, verify: bool = True) -> BinaryIO:
        """A file for reading, compared with what was recorded when it was written.

        Args:
            verify: compare the content of a local file too, not its size alone; what comes from a URL always is.

        Raises:
            ShardError: it is missing, torn, not what was written, or cannot be fetched.
        """
        if self.is_remote:
            return self._open_cached(name, size, sha256)
        path = Path(self.location) / name
        check_file(path, size, sha256 if verify else None)
        try:
            return open(path, "rb", buffering=0)
        except OSError as error:
            raise ShardError(f"{path}: cannot read ({error.strerror}); check its permissions") from None

    def _open_cached(self, name: str, size: int, sha256: str) -> BinaryIO:
        if self._cache is None:
            raise ShardError(f"{self.location}: set data.cache to a local folder for what is fetched from there")
        path = self._cache / f"{sha256}{Path(name).suffix}"
        with _locked(self._cache / f".{path.name}.lock"):
            while True:
                if not (path.is_file() and path.stat().st_size == size):
                    self._download(name, path, sha256)
                    self._shrink_cache(keep=path)
                # Whoever fetches another file may remove this one, but not from under an open file.
                with suppress(FileNotFoundError):
                    os.utime(path)  # the cache forgets what was not used for the longest time
                    return open(path, "rb", buffering=0)

    def _download(self, name: str, path: Path, sha256: str) -> None:
        for attempt in range(_ATTEMPTS):
            with whole_file(path) as file:
                try:
                    self._retried(partial(_copy, name, file))
                except OSError as error:
                    reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
                    raise ShardError(f"{self.describe(name)}: cannot fetch ({reason}); check the store") from None
            if sha256_of(path) == sha256:
                return
            path.unlink()
            _pause(attempt)
        raise ShardError(
            f"{self.describe(name)}: its content is not what was written (sha256 differs); upload or prepare it anew"
        )

    def _shrink_cache(self, keep: Path) -> None:
        assert self._cache is not None
        with _locked(self._cache / ".shrink.lock"):
            files = [p for p in self._cache.iterdir() if p.is_file() and not p.name.startswith(".")]
            sizes = {}
            for path in files:
                with suppress(FileNotFoundError):
                    sizes[path] = path.stat()
            total = sum(stat.st_size for stat in sizes.values())
            for path in sorted(sizes, key=lambda p: sizes[p].st_mtime_ns):
                if total <= self._cache_bytes:
                    return
                if path != keep:
                    path.unlink(missing_ok=True)
                    total -= sizes[path].st_size

    def _retried(self, action: Callable[[Any, str], T]) -> T:
        """Act on the store; what fails may pass, so it is tried again after growing pauses."""
        for attempt in range(_ATTEMPTS):
            try:
                return action(*self._filesystem())
            except (FileNotFoundError, PermissionError, ShardError):
                raise
            except Exception as error:  # clients raise what their libraries raise
                if attempt == _ATTEMPTS - 1:
                    raise OSError(f"{type(error).__name__}: {error}, {_ATTEMPTS} attempts") from error
                _pause(attempt)
        raise AssertionError("the last attempt returns or raises")

    def _filesystem(self) -> tuple[Any, str]:
        if self._client is None or self._client[0] != os.getpid():
            import fsspec

            try:
                fs, root = fsspec.url_to_fs(self.location, skip_instance_cache=True, **self._options)
            except (ImportError, ValueError) as error:
                raise ShardError(f"{self.location}: cannot be opened ({error}); install the client for it") from None
            self._client = os.getpid(), fs, root
        return self._client[1:]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None}


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


def _size_and_sha256(fs: Any, url: str) -> tuple[int, str]:
    with fs.open(url, "rb") as source:
        sha256 = hashlib.file_digest(source, "sha256").hexdigest()
        return source.tell(), sha256


def _copy(name: str, file: BinaryIO, fs: Any, root: str) -> None:
    file.seek(0)
    file.truncate()
    with fs.open(f"{root}/{name}", "rb") as source:
        shutil.copyfileobj(source, file, 1 << 20)


def _pause(attempt: int) -> None:
    # Ranks that failed together must not come back together.
    time.sleep(_FIRST_PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1.0))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file, so that the processes of a machine fetch a file once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
