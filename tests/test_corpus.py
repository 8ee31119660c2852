import base64
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from data_pipeline.corpus import (
    CorpusConfig,
    Document,
    ReadCounts,
    SourceConfig,
    SourceFile,
    files_of,
    list_files,
    read_documents,
    read_files,
    source_name,
)
from data_pipeline.documents import BadRecords
from data_pipeline.errors import CorpusError


def read(*sources: SourceConfig) -> tuple[list[Document], ReadCounts]:
    counts = ReadCounts()
    return list(read_documents(CorpusConfig(sources=list(sources)), counts)), counts


def jsonl(path: Path, **settings: Any) -> SourceConfig:
    return SourceConfig(path=str(path), format="jsonl", **settings)


def text(path: Path | str, **settings: Any) -> SourceConfig:
    return SourceConfig(path=str(path), format="text", **settings)


def names_of(source: SourceConfig) -> list[str]:
    return [Path(file.path).name for file in files_of(source)]


def error_of(*sources: SourceConfig) -> str:
    """The message of the one-line CorpusError that reading raises."""
    with pytest.raises(CorpusError) as caught:
        read(*sources)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        '{"text": "one\\n潮"}\r\n\n  \n{"prompt": "1 + 1 =", "answer": " 2"}\n'
        '{"text": "x", "meta": [1, {}]}\n{"prompt": "", "answer": "\\ud83d\\ude42"}'.encode()
    )
    documents, counts = read(jsonl(path))
    assert documents == [
        Document("one\n潮", "", (str(path), 1), "a"),
        Document(" 2", "1 + 1 =", (str(path), 4), "a"),
        Document("x", "", (str(path), 5), "a"),
        Document("🙂", "", (str(path), 6), "a"),
    ]
    assert counts == ReadCounts(files=1, records=4, documents=4)


def test_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("潮汐\r\nsecond line\n".encode())
    documents, counts = read(text(path))
    assert documents == [Document("潮汐\r\nsecond line\n", "", (str(path), 0), "a")]
    assert counts == ReadCounts(files=1, records=1, documents=1)


def test_sources_are_read_in_their_order_and_files_sorted(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "z.jsonl").write_text('{"text": "z"}\n')
    documents, counts = read(jsonl(tmp_path / "z.jsonl"), text(tmp_path, exclude=["*.jsonl"]))
    assert [d.text for d in documents] == ["z", "a.txt", "b.txt", "sub/c.txt"]
    assert counts == ReadCounts(files=4, records=4, documents=4)


def test_glob(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "sub/c.txt", "sub/deep/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    assert names_of(text(tmp_path / "*.txt")) == ["a.txt"]
    assert names_of(text(tmp_path / "**" / "*.txt")) == ["a.txt", "c.txt", "d.txt"]
    assert names_of(text(tmp_path)) == ["a.txt", "b.md", "c.txt", "d.txt"]


def test_exclude(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "draft_a.txt"):
        (tmp_path / name).write_text(name)
    assert names_of(text(tmp_path, exclude=["*/draft_*", "*/b.txt"])) == ["a.txt"]
    with pytest.raises(CorpusError, match=r"corpus\.sources\.exclude leaves out every file"):
        files_of(text(tmp_path, exclude=["*"]))


def test_a_path_with_glob_characters_is_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "run [v2]"
    folder.mkdir()
    (folder / "a[1].txt").write_text("x")
    found = [SourceFile(str(folder / "a[1].txt"), 0, 1)]
    assert files_of(text(folder / "a[1].txt")) == found
    assert files_of(text(folder)) == found
    assert [d.text for d in read(text(folder))[0]] == ["x"]


def test_stdlib_placeholder() -> None:
    (found,) = files_of(text("{stdlib}/textwrap.py"))
    assert found.path == str(Path(sysconfig.get_path("stdlib")) / "textwrap.py")
    documents, _ = read(text("{stdlib}/textwrap.py"))
    assert "def wrap" in documents[0].text


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "x"}\n{"text": ""}\n')
    (tmp_path / "empty.txt").write_text("")
    documents, counts = read(jsonl(tmp_path / "a.jsonl"), text(tmp_path / "empty.txt"))
    assert [d.text for d in documents] == ["x"]
    assert counts == ReadCounts(files=2, records=4, documents=1, empty=3)


@pytest.fixture
def broken_utf8(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "b\xffd"}\n{"text": "\xe6\xbd"}\n{"text": "end"}\n')
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    return tmp_path


def test_invalid_utf8_is_an_error_by_default(broken_utf8: Path) -> None:
    message = error_of(jsonl(broken_utf8 / "a.jsonl"))
    assert f"{broken_utf8 / 'a.jsonl'}:2: " in message
    assert "not UTF-8 at byte 11" in message
    assert "invalid_utf8" in message
    assert f"{broken_utf8 / 'b.txt'}: not UTF-8 at byte 3" in error_of(text(broken_utf8 / "b.txt"))


def test_invalid_utf8_replaced(broken_utf8: Path) -> None:
    sources = [f(broken_utf8 / n, invalid_utf8="replace") for f, n in ((jsonl, "a.jsonl"), (text, "b.txt"))]
    documents, counts = read(*sources)
    assert [d.text for d in documents] == ["good", "b\ufffdd", "\ufffd", "end", "caf\ufffd"]
    assert counts == ReadCounts(files=2, records=5, documents=5, invalid_utf8_replaced=3)


def test_invalid_utf8_quarantined(broken_utf8: Path, tmp_path: Path) -> None:
    sources = [jsonl(broken_utf8 / "a.jsonl"), text(broken_utf8 / "b.txt")]
    config, counts = CorpusConfig(sources=sources, on_bad_record="quarantine"), ReadCounts()
    with BadRecords(tmp_path / "bad.jsonl") as bad:
        documents = list(read_files(config, list_files(config), counts, bad))
    assert [(d.text, d.origin[1]) for d in documents] == [("good", 1), ("end", 4)]
    assert counts == ReadCounts(files=2, records=5, documents=2, bad_records={"invalid_utf8": 3})
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text("utf-8").splitlines()]
    assert [(Path(x["file"]).name, x["line"], x["reason"]) for x in lines] == [
        ("a.jsonl", 2, "invalid_utf8"),
        ("a.jsonl", 3, "invalid_utf8"),
        ("b.txt", 0, "invalid_utf8"),
    ]
    assert base64.b64decode(lines[0]["record_base64"]) == b'{"text": "b\xffd"}\n'


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("not json", "not JSON"),
        ('{"text": "torn', "not JSON"),
        ('{"text": "a"} {"text": "b"}', "not JSON"),
        ('\ufeff{"text": "byte order mark"}', "not JSON"),
        ("9" * 5000, "JSON"),
        ("[1, 2]", "needs the fields"),
        ('"text"', "needs the fields"),
        ('"prompt"', "needs the fields"),
        ("null", "needs the fields"),
        ("{}", "needs the fields"),
        ('{"Text": "x"}', "needs the fields"),
        ('{"prompt": "x"}', "needs the fields"),
        ('{"answer": "x"}', "needs the fields"),
        ('{"prompt": "x", "text": "y"}', "needs the fields"),
        ('{"text": 1}', '"text" must be a string, not int'),
        ('{"text": null}', '"text" must be a string, not NoneType'),
        ('{"text": ["x"]}', '"text" must be a string, not list'),
        ('{"prompt": 12, "answer": "x"}', '"prompt" must be a string, not int'),
        ('{"prompt": "x", "answer": 12}', '"answer" must be a string, not int'),
        ('{"prompt": "x", "answer": ""}', '"answer" is empty'),
        ('{"prompt": "", "answer": ""}', '"answer" is empty'),
        ('{"text": "\\ud800"}', "surrogate"),
        ('{"text": "\\ude42\\ud83d"}', "surrogate"),
        ('{"prompt": "\\udfff", "answer": "x"}', "surrogate"),
        ('{"prompt": "x", "answer": "\\ud800"}', "surrogate"),
        ('{"text": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
        ('{"a":' * 200_000 + "1" + "}" * 200_000, "nested too deeply"),
    ],
    ids=lambda value: value[:24].encode("ascii", "backslashreplace").decode(),
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, part: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n{{"text": "good"}}\n', "utf-8")
    message = error_of(jsonl(path))
    assert message.startswith(f"{path}:2: ")
    assert part in message
    assert len(message) < 400


def test_documents_before_a_malformed_line_are_read(tmp_path: Path) -> None:
    """Reading streams: an error stands where the line is, not before the first document."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\nbad\n')
    documents: Iterator[Document] = read_documents(CorpusConfig(sources=[jsonl(path)]), ReadCounts())
    assert next(documents).text == "good"
    with pytest.raises(CorpusError):
        next(documents)


def test_missing_file(tmp_path: Path) -> None:
    for path in ("no.jsonl", "*.txt", "no/such/folder"):
        message = error_of(jsonl(tmp_path / path))
        assert str(tmp_path / path) in message
        assert "no such file" in message
    (tmp_path / "folder").mkdir()
    assert "no such file" in error_of(text(tmp_path / "folder"))


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # a mode would not keep root out
    assert "cannot read (Permission denied)" in error_of(jsonl(path))


def test_every_character_of_a_text_survives(tmp_path: Path) -> None:
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    (tmp_path / "a.txt").write_bytes(everything.encode())
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": everything}, ensure_ascii=False) + "\n", "utf-8", newline="\n"
    )
    for source in (text(tmp_path / "a.txt"), jsonl(tmp_path / "a.jsonl")):
        ((document,), _) = read(source)
        assert document.text == everything


def test_nan_and_huge_numbers_in_other_fields_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "score": NaN}\n{"text": "y", "n": ' + "9" * 400 + "}\n")
    assert [d.text for d in read(jsonl(tmp_path / "a.jsonl"))[0]] == ["x", "y"]


def test_nul_bytes_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\0b\n\0")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\u0000b"}\n')
    documents, _ = read(text(tmp_path / "a.txt"), jsonl(tmp_path / "a.jsonl"))
    assert [d.text for d in documents] == ["a\0b\n\0", "a\0b"]


@pytest.mark.slow
def test_a_line_of_fifty_megabytes(tmp_path: Path) -> None:
    long = "潮汐 tide " * 4_500_000
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": long}, ensure_ascii=False) + '\n{"text": "next"}\n', "utf-8", newline="\n"
    )
    assert (tmp_path / "a.jsonl").stat().st_size > 50_000_000
    documents, _ = read(jsonl(tmp_path / "a.jsonl"))
    assert [d.text for d in documents] == [long, "next"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/b/c.jsonl"], ["c"]),
        (["data/*.jsonl", "other/data/"], ["data", "data-2"]),
        (["{stdlib}/**/*.py", "{stdlib}"], ["stdlib", "stdlib-2"]),
        (["s3://bucket/web pages/**/*.parquet", "s3://bucket/*"], ["web-pages", "bucket"]),
        (["*.txt", "/", ".hidden/*", "潮/*"], ["source", "source-2", "hidden", "source-3"]),
    ],
)
def test_sources_have_names_of_their_own(paths: list[str], names: list[str]) -> None:
    config = CorpusConfig(sources=[text(path) for path in paths])
    assert [source_name(config, i) for i in range(len(paths))] == names


def test_a_given_name_is_kept_and_in_every_document(tmp_path: Path) -> None:
    (tmp_path / "web.txt").write_text("x")
    config = CorpusConfig(sources=[text(tmp_path / "web.txt"), text(tmp_path / "web.txt", name="web")])
    assert [source_name(config, i) for i in range(2)] == ["web-2", "web"]
    assert [d.source for d in read_documents(config, ReadCounts())] == ["web-2", "web"]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"name": "a b"}, "String should match pattern"),
        ({"csv_delimiter": ",,"}, "at most 1 character"),
        ({"invalid_utf8": "skip"}, "'error' or 'replace'"),
        ({"extract_timeout_seconds": 0.0}, "greater than 0"),
    ],
)
def test_a_source_is_checked(change: dict[str, Any], part: str) -> None:
    with pytest.raises(ValidationError, match=part):
        SourceConfig(**{"path": "a", "format": "csv"} | change)


def test_a_corpus_is_checked() -> None:
    with pytest.raises(ValidationError, match="b occurs more than once"):
        CorpusConfig(sources=[text("a", name="b"), text("c", name="b")])
    for template in ("### {role}\n", "{content}{content}"):
        with pytest.raises(ValidationError, match=r"must hold \{content\} once"):
            CorpusConfig(sources=[text("a")], chat_template=template)


def test_counts_add_up() -> None:
    counts = ReadCounts(files=1, bad_records={"a": 1})
    counts.add(ReadCounts(files=2, documents=3, bad_records={"a": 1, "b": 2}))
    counts.add(asdict(ReadCounts(empty=4, filtered={"c": 5})))
    assert counts == ReadCounts(files=3, documents=3, empty=4, bad_records={"a": 2, "b": 2}, filtered={"c": 5})


def test_some_files_of_a_corpus(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    config = CorpusConfig(sources=[text(tmp_path), text(tmp_path / "b.txt", name="again")])
    files = list_files(config)
    assert [(Path(f.path).name, f.source, f.bytes) for f in files] == [
        ("a.txt", 0, 1),
        ("b.txt", 0, 1),
        ("c.txt", 0, 1),
        ("b.txt", 1, 1),
    ]
    assert [(d.text, d.source) for d in read_files(config, files[2:], ReadCounts())] == [
        ("c", source_name(config, 0)),
        ("b", "again"),
    ]
