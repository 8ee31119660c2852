"""Listing and opening files, local and remote."""

import gzip
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
import zstandard

from data_pipeline.corpus import SourceConfig, files_of
from data_pipeline.errors import CorpusError
from data_pipeline.readers.sources import BrokenFileError, open_source

TREE = (
    "a.txt",
    "b.md",
    ".hidden.txt",
    "run [v2]/a[1].txt",
    "run v/x.txt",
    "sub/c.txt",
    "sub/deep/d.txt",
    "sub/deep/.git/e.txt",
    "sub.txt/f",
    "sub-2/c.txt",
    "潮/g.txt",
)


@pytest.fixture
def tree(tmp_path: Path) -> tuple[str, str]:
    """The same files on disk and behind a URL: their roots."""
    url = f"memory://{uuid.uuid4().hex}"
    fs = fsspec.filesystem("memory")
    for name in TREE:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        fs.pipe_file(f"{url}/{name}", name.encode())
    return str(tmp_path), url


def listed(root: str, path: str, **settings: Any) -> list[str]:
    source = SourceConfig(path=f"{root}{path}", format="text", **settings)
    files = files_of(source)
    assert all(file.path.startswith(f"{root}/") for file in files)
    names = [file.path[len(root) + 1 :] for file in files]
    assert [file.bytes for file in files] == [len(name.encode()) for name in names]
    return names


VISIBLE = sorted(name for name in TREE if "/." not in f"/{name}")


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("", VISIBLE),
        ("/", VISIBLE),
        ("/**", VISIBLE),
        ("/a.txt", ["a.txt"]),
        ("/*.txt", ["a.txt"]),
        ("/.*.txt", [".hidden.txt"]),
        ("/*/*.txt", ["run [v2]/a[1].txt", "run v/x.txt", "sub-2/c.txt", "sub/c.txt", "潮/g.txt"]),
        ("/**/*.txt", [name for name in VISIBLE if name.endswith(".txt")]),
        ("/**/deep/**/*.txt", ["sub/deep/d.txt"]),
        ("/**/.git/*", ["sub/deep/.git/e.txt"]),
        ("/sub", ["sub/c.txt", "sub/deep/d.txt"]),
        ("/sub/**/d.*", ["sub/deep/d.txt"]),
        ("/sub*/*", ["sub-2/c.txt", "sub.txt/f", "sub/c.txt"]),
        ("/?.[mt]*", ["a.txt", "b.md"]),
        ("/[!a].*", ["b.md"]),
        ("/run [v2]", ["run [v2]/a[1].txt"]),
        ("/run [v2]/a[1].txt", ["run [v2]/a[1].txt"]),
        ("/run [v2]/*", ["run v/x.txt"]),
        ("/潮/*", ["潮/g.txt"]),
    ],
)
def test_local_and_remote_paths_mean_the_same(tree: tuple[str, str], path: str, names: list[str]) -> None:
    for root in tree:
        assert listed(root, path) == names, root


@pytest.mark.parametrize("path", ["/no", "/no/*.txt", "/*.no", "/a.txt/*", "/sub/*/*/*"])
def test_a_path_that_means_nothing(tree: tuple[str, str], path: str) -> None:
    for root in tree:
        with pytest.raises(CorpusError, match="there is no such file"):
            listed(root, path)


def test_excluded_locally_and_remotely(tree: tuple[str, str]) -> None:
    for root in tree:
        assert listed(root, "/sub", exclude=["*/deep/*"]) == ["sub/c.txt"]
        with pytest.raises(CorpusError, match=r"corpus\.sources\.exclude leaves out every file"):
            files_of(SourceConfig(path=root, format="text", exclude=["*"]))


def test_relative_paths_stay_relative(tree: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree[0])
    for path, names in (("sub/*.txt", ["sub/c.txt"]), ("*.md", ["b.md"]), ("sub", ["sub/c.txt", "sub/deep/d.txt"])):
        assert [f.path for f in files_of(SourceConfig(path=path, format="text"))] == names


def test_a_file_url_is_a_path(tree: tuple[str, str]) -> None:
    assert [f.path for f in files_of(SourceConfig(path=f"file://{tree[0]}/a.txt", format="text"))] == [
        f"{tree[0]}/a.txt"
    ]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("x")
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)  # a mode would not keep root out
    with pytest.raises(CorpusError, match=r"cannot list .*Permission denied"):
        files_of(SourceConfig(path=str(tmp_path), format="text"))


@pytest.mark.parametrize(
    ("url", "part"),
    [("nonsense://a/b", "nonsense"), ("memory://nowhere/*.txt", "there is no such file")],
)
def test_a_url_that_leads_nowhere(url: str, part: str) -> None:
    with pytest.raises(CorpusError) as caught:
        files_of(SourceConfig(path=url, format="text"))
    message = str(caught.value)
    assert part in message
    assert url in message
    assert len(message.splitlines()) == 1


DATA = b"".join(b"%d tide\n" % n for n in range(40_000))
HALF = len(DATA) // 2
SKIPPABLE = b"\x50\x2a\x4d\x18\x05\0\0\0hello"


def several(compress: Any) -> bytes:
    return compress(DATA[:HALF]) + compress(DATA[HALF:])


def stream_of(folder: Path, name: str, data: bytes) -> Any:
    path = folder / name
    path.write_bytes(data)
    return open_source(open(path, "rb"), str(path), len(data))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a", DATA),
        ("a.gz", gzip.compress(DATA)),
        ("a.gz", several(gzip.compress)),
        ("a.zst", zstandard.compress(DATA)),
        ("a.zst", several(zstandard.compress)),
        (
            "a.zst",
            SKIPPABLE + zstandard.compress(DATA[:HALF]) + SKIPPABLE + zstandard.compress(DATA[HALF:]) + SKIPPABLE,
        ),
    ],
)
def test_a_stream_holds_everything(tmp_path: Path, name: str, data: bytes) -> None:
    with stream_of(tmp_path, name, data) as stream:
        assert b"".join(stream) == DATA
    with stream_of(tmp_path, name, data) as stream:
        assert stream.read() == DATA


@pytest.mark.parametrize("name", ["a.gz", "a.zst"])
@pytest.mark.parametrize("damage", ["torn", "torn in the second", "garbage after", "flipped", "empty", "plain"])
def test_a_broken_stream_is_never_a_shorter_one(tmp_path: Path, name: str, damage: str) -> None:
    compress = gzip.compress if name == "a.gz" else zstandard.ZstdCompressor(write_checksum=True).compress
    one, two = compress(DATA), several(compress)
    flipped = bytearray(one)
    flipped[len(one) // 2] ^= 16
    data = {
        "torn": one[:-3],
        "torn in the second": two[: len(two) * 3 // 4],
        "garbage after": one + b"garbage",
        "flipped": bytes(flipped),
        "empty": b"",
        "plain": DATA[:1000],
    }[damage]
    read = []
    with pytest.raises(BrokenFileError), stream_of(tmp_path, name, data) as stream:
        read.extend(stream)
    assert DATA.startswith(b"".join(read[:-1]))
    if damage == "torn in the second":
        assert len(read) > 19_000  # what comes before the tear is read


def test_configuring_loads_no_client() -> None:
    heavy = ("torch", "datatrove", "pyarrow", "fsspec", "ray", "loguru")
    code = f"import sys, data_pipeline.corpus; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
