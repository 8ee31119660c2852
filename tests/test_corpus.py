import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.corpus import CorpusConfig, Document, ReadCounts, SourceConfig, files_of, read_documents
from data_pipeline.errors import CorpusError


def read(*sources: SourceConfig) -> tuple[list[Document], ReadCounts]:
    counts = ReadCounts()
    return list(read_documents(CorpusConfig(sources=list(sources)), counts)), counts


def jsonl(path: Path, **settings: Any) -> SourceConfig:
    return SourceConfig(path=str(path), format="jsonl", **settings)


def text(path: Path | str, **settings: Any) -> SourceConfig:
    return SourceConfig(path=str(path), format="text", **settings)


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
        Document("one\n潮", "", (str(path), 1)),
        Document(" 2", "1 + 1 =", (str(path), 4)),
        Document("x", "", (str(path), 5)),
        Document("🙂", "", (str(path), 6)),
    ]
    assert counts == ReadCounts(files=1, documents=4)


def test_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("潮汐\r\nsecond line\n".encode())
    documents, counts = read(text(path))
    assert documents == [Document("潮汐\r\nsecond line\n", "", (str(path), 0))]
    assert counts == ReadCounts(files=1, documents=1)


def test_sources_are_read_in_their_order_and_files_sorted(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "z.jsonl").write_text('{"text": "z"}\n')
    documents, counts = read(jsonl(tmp_path / "z.jsonl"), text(tmp_path, exclude=["*.jsonl"]))
    assert [d.text for d in documents] == ["z", "a.txt", "b.txt", "sub/c.txt"]
    assert counts == ReadCounts(files=4, documents=4)


def test_glob(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "sub/c.txt", "sub/deep/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    assert [p.name for p in files_of(text(tmp_path / "*.txt"))] == ["a.txt"]
    assert [p.name for p in files_of(text(tmp_path / "**" / "*.txt"))] == ["a.txt", "c.txt", "d.txt"]
    assert [p.name for p in files_of(text(tmp_path))] == ["a.txt", "b.md", "c.txt", "d.txt"]


def test_exclude(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "draft_a.txt"):
        (tmp_path / name).write_text(name)
    assert [p.name for p in files_of(text(tmp_path, exclude=["*/draft_*", "*/b.txt"]))] == ["a.txt"]
    with pytest.raises(CorpusError, match=r"corpus\.sources\.exclude leaves out every file"):
        files_of(text(tmp_path, exclude=["*"]))


def test_a_path_with_glob_characters_is_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "run [v2]"
    folder.mkdir()
    (folder / "a[1].txt").write_text("x")
    assert files_of(text(folder / "a[1].txt")) == [folder / "a[1].txt"]
    assert files_of(text(folder)) == [folder / "a[1].txt"]


def test_stdlib_placeholder() -> None:
    (found,) = files_of(text("{stdlib}/textwrap.py"))
    assert found == Path(sysconfig.get_path("stdlib")) / "textwrap.py"
    documents, _ = read(text("{stdlib}/textwrap.py"))
    assert "def wrap" in documents[0].text


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "x"}\n{"text": ""}\n')
    (tmp_path / "empty.txt").write_text("")
    documents, counts = read(jsonl(tmp_path / "a.jsonl"), text(tmp_path / "empty.txt"))
    assert [d.text for d in documents] == ["x"]
    assert counts == ReadCounts(files=2, documents=1, empty=3)


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
    assert counts == ReadCounts(files=2, documents=5, invalid_utf8_replaced=3)


def test_invalid_utf8_skipped(broken_utf8: Path) -> None:
    sources = [f(broken_utf8 / n, invalid_utf8="skip") for f, n in ((jsonl, "a.jsonl"), (text, "b.txt"))]
    documents, counts = read(*sources)
    assert [(d.text, d.origin[1]) for d in documents] == [("good", 1), ("end", 4)]
    assert counts == ReadCounts(files=2, documents=2, invalid_utf8_skipped=3)


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
