"""Shards in a folder and behind a cache: fsspec's `memory://` stands for the object store, with faults on demand."""

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_pipeline import storage as module
from data_pipeline.errors import ShardError
from data_pipeline.ordering import RowAddress
from data_pipeline.rows import RowFormat, RowReader, write_row_plan
from data_pipeline.shards import Manifest
from data_pipeline.storage import Storage


class FaultyStore(MemoryFileSystem):
    """An object store in memory: the next `failing` accesses fail, every read is counted by name."""

    protocol = "faulty"
    store: dict[str, Any] = {}  # noqa: RUF012 (as in the class that is extended)
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    failing = 0
    torn = 0
    reads: list[str] = []  # noqa: RUF012

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        cls = type(self)
        if "r" in mode:
            cls.reads.append(path)
            if cls.failing:
                cls.failing -= 1
                raise OSError("503 Slow Down")
            if cls.torn:
                cls.torn -= 1
                return _Torn(b"torn")
        return super()._open(path, mode, **kwargs)

    def cat_file(self, path: str, *_: Any, **__: Any) -> bytes:
        with self._open(self._strip_protocol(path)) as file:
            return file.read()


class _Torn:
    def __init__(self, data: bytes):
        self._data = data

    def __enter__(self) -> "_Torn":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, _: int = -1) -> bytes:
        data, self._data = self._data, b""
        return data


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FaultyStore]]:
    fsspec.register_implementation("faulty", FaultyStore, clobber=True)
    monkeypatch.setattr(module, "_FIRST_PAUSE_SECONDS", 0.0)
    FaultyStore.store.clear()
    FaultyStore.pseudo_dirs[:] = [""]
    FaultyStore.failing = FaultyStore.torn = 0
    FaultyStore.reads.clear()
    yield FaultyStore
    FaultyStore.store.clear()


def put(name: str, data: bytes) -> dict[str, Any]:
    """Store a file; what was recorded of it."""
    Storage("faulty://bucket/shards").write(name, data)
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def error_of(action: Any) -> str:
    with pytest.raises(ShardError) as caught:
        action()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_file_is_fetched_once(store: type[FaultyStore], tmp_path: Path) -> None:
    recorded = put("a.tar", b"content")
    storage = Storage("faulty://bucket/shards", tmp_path / "cache")
    first, second = (storage.open("a.tar", **recorded) for _ in range(2))
    assert first.name == second.name
    assert first.read() == second.read() == b"content"
    assert len(store.reads) == 1
    # Another process of the machine, or a later run, finds it too.
    assert Storage("faulty://bucket/shards", tmp_path / "cache").open("a.tar", **recorded).read() == b"content"
    assert len(store.reads) == 1


def test_a_store_that_fails_at_times(store: type[FaultyStore], tmp_path: Path) -> None:
    recorded = put("a.tar", b"content")
    storage = Storage("faulty://bucket/shards", tmp_path / "cache")
    store.failing = 4
    assert storage.open("a.tar", **recorded).read() == b"content"
    store.failing = 4
    assert storage.read("a.tar") == b"content"


def test_a_store_that_fails_for_good(store: type[FaultyStore], tmp_path: Path) -> None:
    recorded = put("a.tar", b"content")
    storage = Storage("faulty://bucket/shards", tmp_path / "cache")
    store.failing = 1000
    message = error_of(lambda: storage.open("a.tar", **recorded))
    assert "faulty://bucket/shards/a.tar" in message
    assert "503 Slow Down" in message
    assert not [p for p in (tmp_path / "cache").iterdir() if not p.name.startswith(".")]


def test_what_was_torn_on_the_way_is_fetched_again(store: type[FaultyStore], tmp_path: Path) -> None:
    recorded = put("a.tar", b"content")
    store.torn = 2
    file = Storage("faulty://bucket/shards", tmp_path / "cache").open("a.tar", **recorded)
    assert file.read() == b"content"


@pytest.mark.usefixtures("store")
def test_what_is_not_what_was_written(tmp_path: Path) -> None:
    recorded = put("a.tar", b"content")
    put("a.tar", b"CONTENT")
    storage = Storage("faulty://bucket/shards", tmp_path / "cache")
    assert "sha256 differs" in error_of(lambda: storage.open("a.tar", **recorded))
    assert not [p for p in (tmp_path / "cache").iterdir() if not p.name.startswith(".")]


def test_a_missing_file_is_not_asked_for_again(store: type[FaultyStore], tmp_path: Path) -> None:
    recorded = put("a.tar", b"content")
    storage = Storage("faulty://bucket/shards", tmp_path / "cache")
    assert "there is no such file" in error_of(lambda: storage.open("b.tar", **recorded))
    assert len(store.reads) <= 1


@pytest.mark.usefixtures("store")
def test_a_url_needs_a_cache() -> None:
    recorded = put("a.tar", b"content")
    assert "set data.cache" in error_of(lambda: Storage("faulty://bucket/shards").open("a.tar", **recorded))


def test_an_unknown_protocol(tmp_path: Path) -> None:
    storage = Storage("nowhere://bucket", tmp_path)
    assert "nowhere://bucket: cannot be opened" in error_of(lambda: storage.read("a"))


@pytest.mark.usefixtures("store")
def test_the_cache_forgets_what_was_not_used_for_the_longest_time(tmp_path: Path) -> None:
    recorded = {f"{n}.tar": put(f"{n}.tar", bytes([n]) * 100) for n in range(5)}
    storage = Storage("faulty://bucket/shards", tmp_path / "cache", cache_bytes=300)
    paths = {}
    for age, name in enumerate(["0.tar", "1.tar", "2.tar", "0.tar"]):
        paths[name] = Path(storage.open(name, **recorded[name]).name)
        os.utime(paths[name], ns=(age * 10**9, age * 10**9))
    paths["3.tar"] = Path(storage.open("3.tar", **recorded["3.tar"]).name)
    assert {name for name, path in paths.items() if path.exists()} == {"0.tar", "2.tar", "3.tar"}
    # A file larger than the cache is kept as long as it is the newest.
    recorded["large"] = put("large", b"x" * 1000)
    paths["large"] = Path(storage.open("large", **recorded["large"]).name)
    assert {name for name, path in paths.items() if path.exists()} == {"large"}


def test_many_readers_fetch_a_file_once(store: type[FaultyStore], tmp_path: Path) -> None:
    recorded = put("a.tar", b"content" * 1000)
    found: list[bytes] = []

    def read() -> None:
        storage = Storage("faulty://bucket/shards", tmp_path / "cache")
        found.append(storage.open("a.tar", **recorded).read())

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"content" * 1000] * 8
    assert len(store.reads) == 1


@pytest.mark.usefixtures("store")
def test_rows_from_a_store_are_the_rows_of_the_folder(manifest: Manifest, tmp_path: Path) -> None:
    remote = Storage("faulty://bucket/shards", tmp_path / "cache", cache_bytes=20_000)
    for name in manifest.storage.files():
        remote.write(name, manifest.storage.read(name))
    copy = Manifest.load(remote)
    assert copy.hash == manifest.hash
    assert remote.files() == manifest.storage.files()
    assert copy.tokenizer().hash == manifest.tokenizer().hash
    here, there = (RowReader(m, "train", m.tokenizer(), RowFormat(48, 96), seed=1) for m in (manifest, copy))
    assert here.shard_rows == there.shard_rows
    for shard, rows in enumerate(here.shard_rows):
        for row in range(rows):
            ours, theirs = (reader.row(RowAddress(0, shard, row), None) for reader in (here, there))
            assert ours[1].ids.tolist() == theirs[1].ids.tolist()
            assert ours[0].ids.tolist() == theirs[0].ids.tolist()
    # Rows of other sizes are planned there, too, and the same.
    write_row_plan(copy, RowFormat(40, 80))
    assert "rows-40x80/plan.json" in remote.files()


@pytest.mark.usefixtures("store")
def test_no_shards_at_a_url(tmp_path: Path) -> None:
    assert "no manifest.json" in error_of(lambda: Manifest.load(Storage("faulty://bucket/none", tmp_path)))


def test_a_local_folder_needs_no_cache(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "folder")
    storage.write("sub/a", b"content")
    assert storage.files() == ["sub/a"]
    assert storage.exists("sub/a")
    assert storage.read("sub/a") == b"content"
    assert storage.open("sub/a", 7, hashlib.sha256(b"content").hexdigest()).read() == b"content"
    assert "torn" in error_of(lambda: storage.open("sub/a", 8, ""))
    assert "sha256 differs" in error_of(lambda: storage.open("sub/a", 7, "0" * 64))
    assert "No such file" in error_of(lambda: storage.open("sub/b", 7, "0" * 64))
