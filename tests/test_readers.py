"""Files of every format -> documents, and what becomes of the rest."""

import base64
import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

from data_pipeline.corpus import (
    CorpusConfig,
    Document,
    ReadCounts,
    list_files,
    read_documents,
    read_files,
)
from data_pipeline.documents import BadRecords, from_datatrove, to_datatrove
from data_pipeline.errors import CorpusError


def config_of(path: Path, kind: str, on_bad_record: str = "error", **settings: Any) -> CorpusConfig:
    corpus = {k: settings.pop(k) for k in ("chat_template", "filters") if k in settings}
    source = {"path": str(path), "format": kind, "name": "s"} | settings
    return CorpusConfig.model_validate({"sources": [source], "on_bad_record": on_bad_record} | corpus)


def read(path: Path, kind: str, **settings: Any) -> list[Document]:
    counts = ReadCounts()
    documents = list(read_documents(config_of(path, kind, **settings), counts))
    assert counts.unaccounted == 0
    assert counts.documents == len(documents)
    return documents


def error_of(path: Path, kind: str, **settings: Any) -> str:
    with pytest.raises(CorpusError) as caught:
        read(path, kind, **settings)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(str(path))
    return message


def quarantined(path: Path, kind: str, **settings: Any) -> tuple[list[Document], list[dict[str, Any]], ReadCounts]:
    """Documents, the lines of the side file, and counts, of which nothing is missing."""
    config, counts, side = config_of(path, kind, "quarantine", **settings), ReadCounts(), path.parent / "bad.jsonl"
    files = list_files(config)
    with BadRecords(side) as bad:
        documents = list(read_files(config, files, counts, bad))
    lines = [json.loads(line) for line in side.read_text("utf-8").splitlines()] if side.exists() else []
    assert counts.unaccounted == 0
    assert sum(counts.bad_records.values()) == len(lines)
    return documents, lines, counts


def write_jsonl(path: Path, records: list[Any]) -> None:
    path.write_bytes("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode())


def write_csv(path: Path, records: list[Any]) -> None:
    fields = list(dict.fromkeys(name for record in records for name in record))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(records)


def write_parquet(path: Path, records: list[Any]) -> None:
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=3)


WRITERS: dict[str, Callable[[Path, list[Any]], None]] = {
    "jsonl": write_jsonl,
    "csv": write_csv,
    "parquet": write_parquet,
}
TEXTS = ["first", 'quotes "and", commas', "two\nlines\r\n", "潮汐 🙂", "nul \0 byte", " spaces ", "last"]
KINDS = sorted(WRITERS)


@pytest.mark.parametrize("kind", KINDS)
def test_texts(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](path, [{"id": str(i), "text": text, "url": f"http://{i}"} for i, text in enumerate(TEXTS)])
    assert read(path, kind) == [
        Document(text, "", (str(path), i + 1), "s", f"http://{i}") for i, text in enumerate(TEXTS)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_with_answers_in_fields_of_other_names(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](
        path, [{"q": "1+1=", "a": "2", "text": "no", "link": "u"}, {"q": "", "a": "x", "text": "", "link": ""}]
    )
    assert read(path, kind, prompt_field="q", answer_field="a", url_field="link") == [
        Document("2", "1+1=", (str(path), 1), "s", "u"),
        Document("x", "", (str(path), 2), "s"),
    ]
    assert [d.text for d in read(path, kind, text_field="q", prompt_field=None)] == ["1+1="]


CHATS = [
    {"messages": [{"role": "user", "content": "Hi {role}"}, {"role": "assistant", "content": "Hello {content}"}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "A?"},
            {"role": "assistant", "content": "B."},
            {"role": "user", "content": "C?"},
            {"role": "assistant", "content": "D."},
            {"role": "user", "content": "not answered"},
        ]
    },
]
PROMPTS = [
    ("Hello {content}", "### user\nHi {role}\n\n### assistant\n", 1),
    ("B.", "### system\nBe brief.\n\n### user\nA?\n\n### assistant\n", 2),
    ("D.", "### system\nBe brief.\n\n### user\nA?\n\n### assistant\nB.\n\n### user\nC?\n\n### assistant\n", 2),
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_chats(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](path, CHATS)
    assert read(path, kind) == [Document(text, prompt, (str(path), n), "s") for text, prompt, n in PROMPTS]
    _, _, counts = quarantined(path, kind)
    assert counts == ReadCounts(files=1, records=2, documents=3, further_turns=1)


def test_a_chat_of_other_names_and_another_template(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a", [{"turns": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B."}]}])
    fields = {"messages_field": "turns", "role_field": "from", "content_field": "value", "assistant_role": "gpt"}
    (document,) = read(tmp_path / "a", "jsonl", **fields, chat_template="<{role}>{content}</{role}>")
    assert (document.prompt, document.text) == ("<human>A?</human><gpt>", "B.")


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("messages", "reason", "part"),
    [
        ([], "no_assistant_turn", 'no turn of the role "assistant"'),
        ([USER], "no_assistant_turn", 'no turn of the role "assistant"'),
        ("text", "wrong_type", '"messages" must be a list, not str'),
        (None, "wrong_type", '"messages" must be a list, not NoneType'),
        ([USER, "x"], "missing_field", '"messages" 1: needs the fields "role" and "content"'),
        ([{"role": "user"}], "missing_field", '"messages" 0: needs the fields'),
        ([USER, {"role": "assistant", "content": None}], "wrong_type", '"messages" 1: "content" must be a string'),
        ([USER, {"role": 1, "content": ""}], "wrong_type", '"messages" 1: "role" must be a string, not int'),
        ([USER, {"role": "assistant", "content": ""}], "empty_answer", '"messages" 1: "content" is empty'),
    ],
)
def test_a_malformed_chat(tmp_path: Path, messages: Any, reason: str, part: str) -> None:
    good = CHATS[0]
    write_jsonl(tmp_path / "a", [good, {"messages": messages}, good])
    message = error_of(tmp_path / "a", "jsonl")
    assert message.startswith(f"{tmp_path / 'a'}:2: ")
    assert part in message
    documents, (line,), _ = quarantined(tmp_path / "a", "jsonl")
    assert [d.origin[1] for d in documents] == [1, 3]
    assert (line["line"], line["reason"], json.loads(line["record"])) == (2, reason, {"messages": messages})


def compressed(path: Path) -> list[Path]:
    data = path.read_bytes()
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
    path.with_name(path.name + ".zst").write_bytes(zstandard.compress(data))
    return [path.with_name(path.name + ending) for ending in (".gz", ".zst")]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "text"])
def test_compressed_files_hold_the_same(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    path.write_text("潮汐\n") if kind == "text" else WRITERS[kind](path, [{"text": text} for text in TEXTS])
    plain = read(path, kind)
    for other in compressed(path):
        found = read(other, kind)
        assert [(d.text, d.origin[1]) for d in found] == [(d.text, d.origin[1]) for d in plain]
        assert {d.origin[0] for d in found} == {str(other)}


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "text"])
def test_a_torn_file_is_an_error_after_the_records_before(tmp_path: Path, kind: str, ending: str) -> None:
    path = tmp_path / "a"
    texts = [f"{n} {n * n}" for n in range(20_000)]
    path.write_text("x\n" * 20_000) if kind == "text" else WRITERS[kind](path, [{"text": text} for text in texts])
    compressed(path)
    torn = tmp_path / f"a{ending}"
    torn.write_bytes(torn.read_bytes()[:-5])
    message = error_of(torn, kind)
    assert "broken from here on" in message
    documents, (line,), counts = quarantined(torn, kind)
    assert line == {
        "file": str(torn),
        "line": line["line"],
        "reason": "broken_file",
        "what": line["what"],
        "record": None,
    }
    assert counts.bad_records == {"broken_file": 1}
    assert [d.text for d in documents] == texts[: len(documents)]
    if kind == "text":
        assert (documents, line["line"]) == ([], 0)
    else:
        assert line["line"] == len(documents) + (kind == "jsonl") + (kind == "csv")
        assert len(documents) > 5000
        assert message.startswith(f"{torn}:{line['line']}: ")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_missing_fields(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    WRITERS[kind](path, [{"body": "x"}, {"body": "y"}])
    message = error_of(path, kind)
    assert message.startswith(f'{path}:1: needs the fields "text", or "prompt" and "answer", or "messages"')
    assert 'needs the fields "t"; mend it' in error_of(
        path, kind, text_field="t", prompt_field=None, messages_field=None
    )
    documents, lines, counts = quarantined(path, kind)
    assert (documents, counts.bad_records) == ([], {"missing_field": 2})
    assert [line["line"] for line in lines] == [1, 2]


CSV = (
    b'text,url\r\nfirst,\r\n"never closed"x,1\r\n\r\none field\r\n"two\r\nlines",u\r\nthree,of,them\r\n'
    b'caf\xe9,\r\n"nul \0",\r\n,\r\n"open to the end,'
)


def test_csv_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(CSV)
    assert error_of(path, "csv").startswith(f"{path}:2: not CSV (")
    documents, lines, counts = quarantined(path, "csv")
    assert [(d.text, d.url, d.origin[1]) for d in documents] == [
        ("first", "", 1),
        ("two\r\nlines", "u", 4),
        ("nul \0", "", 7),
    ]
    assert [(x["line"], x["reason"]) for x in lines] == [
        (2, "not_csv"),
        (3, "ragged_row"),
        (5, "ragged_row"),
        (6, "invalid_utf8"),
        (9, "not_csv"),
    ]
    assert [x.get("record") for x in lines] == [
        '"never closed"x,1\r\n',
        "one field\r\n",
        "three,of,them\r\n",
        None,
        '"open to the end,',
    ]
    assert base64.b64decode(lines[3]["record_base64"]) == b"caf\xe9,\r\n"
    assert '"text" is not UTF-8 at byte 3' in lines[3]["what"]
    assert counts == ReadCounts(
        files=1, records=9, documents=3, empty=1, bad_records={"not_csv": 2, "ragged_row": 2, "invalid_utf8": 1}
    )
    replaced, lines, counts = quarantined(path, "csv", invalid_utf8="replace")
    assert [d.text for d in replaced] == ["first", "two\r\nlines", "caf\ufffd", "nul \0"]
    assert counts.invalid_utf8_replaced == 1


def test_csv_of_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes("\ufefftext\tn\rold\t1\rlines\t2".encode())  # a byte order mark, tabs, lines that end in \r alone
    assert [d.text for d in read(path, "csv", csv_delimiter="\t")] == ["old", "lines"]
    path.write_bytes(b"")
    assert read(path, "csv") == []
    path.write_text("text,text\na,b\n")
    assert 'its first row names "text" twice' in error_of(path, "csv")


@pytest.mark.slow
def test_a_csv_field_of_fifty_megabytes(tmp_path: Path) -> None:
    long = "tide, " * 9_000_000
    path = tmp_path / "a.csv"
    path.write_text(f'text\n"{long}"\nnext\n')
    assert [d.text for d in read(path, "csv")] == [long, "next"]


def test_parquet_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None, "", "b"], "n": [1, 2, 3, 4]}), path)
    assert error_of(path, "parquet").startswith(f'{path}:2: "text" must be a string, not NoneType')
    documents, (line,), counts = quarantined(path, "parquet")
    assert [(d.text, d.origin[1]) for d in documents] == [("a", 1), ("b", 4)]
    assert (line["line"], line["reason"], json.loads(line["record"])) == (2, "wrong_type", {"text": None})
    assert counts == ReadCounts(files=1, records=4, documents=2, empty=1, bad_records={"wrong_type": 1})


@pytest.mark.parametrize(
    ("column", "kind"), [([1], "int"), ([b"x"], "bytes"), ([["x"]], "list"), ([1.5], "float"), ([True], "bool")]
)
def test_parquet_columns_of_another_type(tmp_path: Path, column: list[Any], kind: str) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a")
    assert f'"text" must be a string, not {kind}' in error_of(tmp_path / "a", "parquet")


def test_parquet_without_the_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x", "y"]}), tmp_path / "a")
    assert error_of(tmp_path / "a", "parquet").startswith(f"{tmp_path / 'a'}:1: needs the fields")
    _, _, counts = quarantined(tmp_path / "a", "parquet")
    assert counts.bad_records == {"missing_field": 2}


@pytest.mark.parametrize("make", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_parquet_strings_of_every_kind(tmp_path: Path, make: Any) -> None:
    pq.write_table(pa.table({"text": pa.array(TEXTS, make)}), tmp_path / "a", row_group_size=2)
    assert [d.text for d in read(tmp_path / "a", "parquet")] == TEXTS


def test_parquet_strings_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a"
    rows = [b"good", b"b\xffd", None, b"end"]
    bad = pa.array(rows, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad, "url": pa.array(["u", "v", "w", None])}), path)
    assert error_of(path, "parquet").startswith(f'{path}:2: "text" is not UTF-8 at byte 1')
    documents, lines, _ = quarantined(path, "parquet")
    assert [(d.text, d.url) for d in documents] == [("good", "u"), ("end", "")]
    assert [(x["line"], x["reason"]) for x in lines] == [(2, "invalid_utf8"), (3, "wrong_type")]
    documents, _, counts = quarantined(path, "parquet", invalid_utf8="replace")
    assert [d.text for d in documents] == ["good", "b\ufffdd", "end"]
    assert counts.invalid_utf8_replaced == 1


def test_parquet_chats_that_are_not_utf8(tmp_path: Path) -> None:
    contents = pa.array([b"ok", b"\xff"], pa.binary()).view(pa.string())
    messages = pa.StructArray.from_arrays([pa.array(["assistant"] * 2), contents], ["role", "content"])
    pq.write_table(pa.table({"messages": pa.ListArray.from_arrays([0, 1, 2], messages)}), tmp_path / "a")
    documents, (line,), _ = quarantined(tmp_path / "a", "parquet")
    assert [d.text for d in documents] == ["ok"]
    assert (line["line"], line["reason"]) == (2, "invalid_utf8")


@pytest.mark.parametrize("damage", ["not parquet", "empty", "torn", "no footer", "flipped"])
def test_a_broken_parquet_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [str(n) * 50 for n in range(500)]}), path, compression="none", use_dictionary=False
    )
    data = bytearray(path.read_bytes())
    data[100:140] = b"\xff" * 40
    path.write_bytes(
        {
            "not parquet": b"text\n" * 50,
            "empty": b"",
            "torn": bytes(data[:-20]),
            "no footer": bytes(data[:500]),
            "flipped": bytes(data),
        }[damage]
    )
    if damage == "flipped":  # the page's lengths are nonsense, or its texts are no UTF-8: never other texts in silence
        documents, lines, _ = quarantined(path, "parquet")
        assert lines
        assert {d.text for d in documents} <= {str(n) * 50 for n in range(500)}
    else:
        assert "the file is broken from here on (parquet: " in error_of(path, "parquet")
        documents, (line,), _ = quarantined(path, "parquet")
        assert (documents, line["line"], line["reason"]) == ([], 1, "broken_file")


def everything(kind: str, path: Path) -> int:
    """Write a file with records of every fate: 4 that are documents, 2 empty ones, 3 malformed ones."""
    good = [{"text": "one"}, {"text": "two"}, {"text": "three and more"}, {"text": "four"}]
    if kind == "jsonl":
        rows = (
            [json.dumps(r).encode() for r in good] + [b'{"text": ""}'] * 2 + [b"{", b'{"text": 1}', b'{"text": "\xff"}']
        )
        path.write_bytes(b"\n".join(rows[i] for i in (0, 4, 1, 6, 7, 2, 5, 8, 3)))
    elif kind == "csv":
        rows = [r["text"].encode() + b"," for r in good] + [b","] * 2 + [b"x", b"a,b,c", b"\xff,"]
        path.write_bytes(b"\n".join([b"text,n", *(rows[i] for i in (0, 4, 1, 6, 7, 2, 5, 8, 3))]))
    elif kind == "parquet":
        texts = [b"one", b"", b"two", None, None, b"three and more", b"", b"\xff", b"four"]
        pq.write_table(pa.table({"text": pa.array(texts, pa.binary()).view(pa.string())}), path, row_group_size=4)
    else:
        path.mkdir()
        for i, data in enumerate(
            [b"one", b"", b"two", b"\xff", b"\xff\xfe", b"three and more", b"", b"caf\xe9", b"four"]
        ):
            (path / f"{i}.txt").write_bytes(data)
    return 9


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "text"])
def test_every_record_ends_up_somewhere(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "corpus"
    records = everything(kind, path)
    config = config_of(path, kind, "quarantine", filters=[{"kind": "length", "max_bytes": 5}])
    counts = ReadCounts()
    with BadRecords(tmp_path / "bad.jsonl") as bad:
        documents = list(read_files(config, list_files(config), counts, bad))
    assert [d.text for d in documents] == ["one", "two", "four"]
    assert counts.records == records
    assert counts.filtered == {"length: too_long": 1}
    assert counts.empty == 2
    assert sum(counts.bad_records.values()) == len((tmp_path / "bad.jsonl").read_text().splitlines()) == 3
    assert counts.unaccounted == 0


def test_a_side_file_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    bad = BadRecords(path)
    bad.add("f", 1, "r", "w", b"\xff")
    bad.add("f", 2, "r", "w", "潮".encode())
    assert not path.exists()
    bad.close()
    assert [json.loads(line).keys() & {"record", "record_base64"} for line in path.read_text("utf-8").splitlines()] == [
        {"record_base64"},
        {"record"},
    ]

    kept = path.read_bytes()
    with pytest.raises(TypeError), BadRecords(path) as broken:  # noqa: PT012
        broken.write({"a": 1})
        broken.write({"a": object()})
    assert path.read_bytes() == kept
    with BadRecords(path):
        pass  # nothing to write: what an earlier run wrote is no longer true
    assert list(tmp_path.iterdir()) == []


def test_documents_survive_datatrove(tmp_path: Path) -> None:
    documents = [
        Document("answer 🙂", "prompt 潮 ", ("s3://b/a.jsonl", 3), "web", "http://x"),
        Document("text\n", "", ("a.txt", 0)),
        Document("", "p", ("a", 1)),
    ]
    assert [from_datatrove(to_datatrove(d)) for d in documents] == documents
    with JsonlWriter(str(tmp_path), "a.jsonl", compression=None) as writer:
        for document in documents:
            writer.write(to_datatrove(document))
    assert [from_datatrove(d) for d in JsonlReader(str(tmp_path)).run()] == documents


def test_datatrove_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    read(tmp_path / "a.jsonl", "jsonl")
    list(JsonlReader(str(tmp_path)).run())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["parquet", "warc"])
def test_a_library_that_is_missing(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("x")

    def missing(step: str, _: Any) -> None:
        raise ImportError(f"Please install `x` to use {step}\n(`pip install x`).")

    monkeypatch.setattr("datatrove.pipeline.base.check_required_dependencies", missing)
    with pytest.raises(
        CorpusError, match=rf"^corpus\.sources\.0 \(format {kind}\): Please install .* \(`pip install x`\)\.$"
    ):
        read(tmp_path / "a", kind)


def test_a_file_that_disappears(tmp_path: Path) -> None:
    config = config_of(tmp_path / "a.jsonl", "jsonl", "quarantine")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    files = list_files(config)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(CorpusError, match=r"cannot read .No such file"):
        list(read_files(config, files, ReadCounts()))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "text", "warc"])
def test_a_disk_that_fails_is_no_malformed_record(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)

    class Failing(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise OSError(5, "Input/output error")

        readinto = read  # type: ignore[assignment]

    monkeypatch.setattr("datatrove.io.DataFolder.open", lambda *_: Failing(b"x" * 100))
    with pytest.raises(CorpusError, match=r"cannot read .Input/output error") as caught:
        quarantined(tmp_path / "a", kind)
    assert str(caught.value).startswith(str(tmp_path / "a"))
