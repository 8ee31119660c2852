"""Corpora in an object store: a real S3-compatible server, which at times is busy."""

import gzip
import io
import json
import multiprocessing
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import torch

from data_pipeline.corpus import CorpusConfig, ReadCounts, SourceFile, list_files, read_documents, read_files
from data_pipeline.errors import CorpusError, ShardError
from data_pipeline.ordering import Order
from data_pipeline.rows import RowFormat, RowReader
from data_pipeline.shards import Manifest
from data_pipeline.storage import Storage
from data_pipeline.stream import Loading, Share, Step, Stream
from tests.object_store import Store, serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    """A store that has the corpus."""
    with serving() as store:
        client = s3fs.S3FileSystem(**store.options, skip_instance_cache=True)
        client.mkdir("bucket")
        for name, data in contents().items():
            client.pipe_file(f"bucket/corpus/{name}", data)
        client.pipe_file("bucket/corpus/texts/", b"")  # the marker of a folder, as some programs write it
        yield store


@pytest.fixture
def store(server: Store) -> Iterator[Store]:
    """The store, which answers everything unless a test says otherwise."""
    yield server
    server.refuses = lambda _: False


def contents() -> dict[str, bytes]:
    """Names and contents of a corpus of every format."""
    lines = "".join(json.dumps({"text": f"{n} 潮汐 " * 20}) + "\n" for n in range(400)).encode()
    table = io.BytesIO()
    pq.write_table(pa.table({"text": [f"row {n}" for n in range(300)]}), table, row_group_size=50)
    return {
        "lines/b.jsonl.gz": gzip.compress(lines),
        "lines/a.jsonl.gz": gzip.compress(lines[: len(lines) // 2].rpartition(b"\n")[0]),
        "lines/sub/c.jsonl.gz": gzip.compress(b'{"text": "last"}\n'),
        "tables/t [1].parquet": table.getvalue(),
        "texts/one.txt": "潮".encode(),
        "texts/two.txt": b"two",
    }


@pytest.fixture
def corpora(store: Store, tmp_path: Path) -> tuple[CorpusConfig, CorpusConfig]:
    """The same corpus on disk and in the store."""
    for name, data in contents().items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(data)

    def corpus(root: str, **settings: Any) -> CorpusConfig:
        kinds = {"lines": "jsonl", "lines/*.gz": "jsonl", "tables/t [1].parquet": "parquet", "texts/*.txt": "text"}
        sources = [{"path": f"{root}/{path}", "format": kind} | settings for path, kind in kinds.items()]
        return CorpusConfig.model_validate(
            {"sources": [*sources, {"path": f"{root}/texts", "format": "text"} | settings]}
        )

    return corpus(str(tmp_path)), corpus("s3://bucket/corpus", storage_options=store.options)


def texts_of(config: CorpusConfig) -> list[tuple[str, int, str]]:
    counts = ReadCounts()
    found = [(Path(d.origin[0]).name, d.origin[1], d.text) for d in read_documents(config, counts)]
    assert counts.unaccounted == 0
    return found


def test_a_bucket_holds_what_a_folder_holds(corpora: tuple[CorpusConfig, CorpusConfig], tmp_path: Path) -> None:
    local, remote = corpora
    ours, theirs = list_files(local), list_files(remote)
    assert [f.path.replace(str(tmp_path), "s3://bucket/corpus") for f in ours] == [f.path for f in theirs]
    assert [(f.source, f.bytes) for f in ours] == [(f.source, f.bytes) for f in theirs]
    assert len(ours) == 3 + 2 + 1 + 2 + 2
    assert texts_of(local) == texts_of(remote)


def test_a_busy_store_is_asked_again(store: Store, corpora: tuple[CorpusConfig, CorpusConfig]) -> None:
    expected = texts_of(corpora[0])
    store.refuses = lambda number: number % 4 == 0
    assert texts_of(corpora[1]) == expected
    assert store.refused >= 3


def hasty(store: Store, path: str) -> CorpusConfig:
    """A corpus of text files whose client asks once."""
    options = store.options | {"config_kwargs": {"retries": {"max_attempts": 0}}}
    source = {"path": f"s3://bucket/corpus{path}", "format": "text", "storage_options": options}
    return CorpusConfig.model_validate({"sources": [source], "on_bad_record": "quarantine"})


def outcome_of(action: Callable[[], Any], path: str) -> Any:
    """What an action gives, or that it fails in one line that names the path."""
    try:
        return action()
    except CorpusError as error:
        message = str(error)
    assert message.startswith(path)
    assert ": cannot " in message
    assert len(message.splitlines()) == 1
    assert len(message) < 400
    return "failed"


PATHS = ["/texts", "/texts/*.txt", "/*/*.txt", "/**/*.txt", "/texts/two.txt"]


@pytest.mark.parametrize("path", PATHS)
def test_a_store_that_stays_busy(store: Store, path: str) -> None:
    config = hasty(store, path)
    files = list_files(config)
    store.refuses = lambda _: True
    assert outcome_of(lambda: list_files(config), config.sources[0].path) == "failed"
    assert outcome_of(lambda: read(config, files), files[0].path) == "failed"


@pytest.mark.parametrize("path", PATHS)
def test_no_refused_request_makes_a_corpus_smaller(store: Store, path: str) -> None:
    """Clients take some refusals for folders without files."""
    config = hasty(store, path)
    files = list_files(config)
    texts = read(config, files)
    failures = 0
    for action, expected, name in (
        (lambda: list_files(config), files, config.sources[0].path),
        (lambda: read(config, files), texts, "s3://bucket/corpus/texts/"),
    ):
        for number in range(1, 6):
            store.refuses = (store.requests + number).__eq__
            found = outcome_of(action, name)
            assert found in (expected, "failed"), number
            failures += found == "failed"
    assert failures


def read(config: CorpusConfig, files: list[SourceFile]) -> list[str]:
    return [d.text for d in read_files(config, files, ReadCounts())]


@pytest.mark.parametrize("path", ["s3://bucket/corpus/no", "s3://bucket/no/*.txt", "s3://nothing/corpus"])
def test_what_is_not_there(store: Store, path: str) -> None:
    source = {"path": path, "format": "text", "storage_options": store.options}
    with pytest.raises(CorpusError, match=f"^{path.replace('*', '.')}: .*no such file"):
        list_files(CorpusConfig.model_validate({"sources": [source]}))


def test_a_forked_process_reads_too(corpora: tuple[CorpusConfig, CorpusConfig]) -> None:
    """Clients do not survive a fork, so a process opens its own."""
    _, remote = corpora
    files = list_files(remote)
    expected = read(remote, files[-2:])  # the client of this process has been used
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(read(remote, files[-2:])), daemon=True)
    process.start()
    assert receiver.poll(60)
    assert receiver.recv() == expected
    process.join(10)
    assert process.exitcode == 0


def steps_of(manifest: Manifest, workers: int, count: int) -> list[Step]:
    reader = RowReader(manifest, "train", manifest.tokenizer(), RowFormat(48, 96), seed=1)
    order, share = Order(reader.shard_rows, 4, seed=1), Share(8, 2, 0, 1)
    return list(islice(Stream(reader, order, share, manifest.hash, Loading(workers)), count))


@pytest.fixture
def shards_there(store: Store, manifest: Manifest) -> Storage:
    """The tiny shards, copied to the store."""
    client = s3fs.S3FileSystem(**store.options, skip_instance_cache=True)
    for name in manifest.storage.files():
        client.pipe_file(f"bucket/shards/{name}", manifest.storage.read(name))
    return Storage("s3://bucket/shards", options=store.options)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_shards_from_a_store_that_is_busy_at_times(
    store: Store,
    shards_there: Storage,
    manifest: Manifest,
    tmp_path: Path,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through a cache too small for all shards, which the loader processes share."""
    monkeypatch.setattr("data_pipeline.storage._FIRST_PAUSE_SECONDS", 0.01)
    remote = Storage(shards_there.location, tmp_path / "cache", 60_000, store.options)
    store.refuses = lambda request: request % 3 == 0
    there = Manifest.load(remote)
    assert there.hash == manifest.hash
    found, expected = steps_of(there, workers, 12), steps_of(manifest, 0, 12)
    assert store.refused > 5
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.identity_sum == theirs.identity_sum
        for one, other in zip(ours.batches, theirs.batches, strict=True):
            assert all(map(torch.equal, one.tensors(), other.tensors()))
    cached = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert cached < 60_000 + 100_000  # the newest file may exceed it


def test_a_shard_that_is_gone_from_the_store_is_named(
    store: Store, shards_there: Storage, manifest: Manifest, tmp_path: Path
) -> None:
    name = manifest.shards("train")[0]["name"]
    client = s3fs.S3FileSystem(**store.options, skip_instance_cache=True)
    client.rm_file(f"bucket/shards/{name}.tar")
    there = Manifest.load(Storage(shards_there.location, tmp_path / "cache", options=store.options))
    with pytest.raises(ShardError, match=f"s3://bucket/shards/{name}.tar: cannot fetch \\(there is no such file\\)"):
        steps_of(there, 2, 40)
