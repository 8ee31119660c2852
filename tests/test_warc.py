"""WARC and WET files -> documents, and what becomes of the rest."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from data_pipeline.corpus import CorpusConfig, Document, ReadCounts, list_files, read_files
from data_pipeline.documents import BadRecords
from data_pipeline.errors import CorpusError

PARAGRAPHS = [f"The tide runs out for the {word} time, and the {word} page says so." for word in ("first", "second")]
PAGE = (
    "<html><head><title>T</title><script>var x = 1;</script></head><body><nav>Home | About</nav>"
    "<article><h1>Tides</h1>{}</article></body></html>"
)


def page(text: str) -> bytes:
    return PAGE.format("".join(f"<p>{text} {text}</p>" for _ in range(3))).encode()


Record = tuple[str, str, bytes, dict[str, str]]


def response(url: str, body: bytes, kind: str = "text/html", **headers: str) -> Record:
    return ("response", url, body, {"WARC-Identified-Payload-Type": kind} | headers)


def archive(records: list[Record], http: dict[str, str] | None = None) -> bytes:
    """An uncompressed archive."""
    file = io.BytesIO()
    writer = WARCWriter(file, gzip=False)
    for number, (kind, url, body, headers) in enumerate(records):
        warc = {"WARC-Date": "2026-01-01T00:00:00Z", "WARC-Record-ID": f"<urn:uuid:{number}>"} | headers
        status = None
        if kind in ("response", "request"):
            lines = list((http or {}).items())
            status = StatusAndHeaders("200 OK", lines, protocol="HTTP/1.1")
            if kind == "request":
                status = StatusAndHeaders("GET / HTTP/1.1", lines, is_http_request=True)
        writer.write_record(
            writer.create_warc_record(url, kind, io.BytesIO(body), warc_headers_dict=warc, http_headers=status)
        )
    return file.getvalue()


def read(
    path: Path, data: bytes, on_bad_record: str = "error", **settings: Any
) -> tuple[list[Document], list[dict[str, Any]], ReadCounts]:
    path.write_bytes(data)
    source = {"path": str(path), "format": "warc", "name": "w", "extract": "none"} | settings
    config = CorpusConfig.model_validate({"sources": [source], "on_bad_record": on_bad_record})
    counts, side = ReadCounts(), path.with_name("bad.jsonl")
    with BadRecords(side) as bad:
        documents = list(read_files(config, list_files(config), counts, bad))
    lines = [json.loads(line) for line in side.read_text("utf-8").splitlines()] if side.exists() else []
    assert counts.unaccounted == 0
    return documents, lines, counts


MIXED: list[Record] = [
    ("warcinfo", "", b"software: x", {}),
    ("request", "http://a/", b"", {}),
    response("http://a/", b"<p>first</p>"),
    response("http://a/image", b"\x89PNG\r\n\x1a\n" + bytes(30), "image/png"),
    response("http://b/", "<p>zweite, für</p>".encode()),
    ("metadata", "http://b/", b"languages-cld2: {}", {}),
    ("conversion", "http://c/", "plain\ntext 潮".encode(), {"Content-Type": "text/plain"}),
    response("http://d/", b"", "text/html"),
]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_pages_and_texts(tmp_path: Path, ending: str) -> None:
    data = archive(MIXED)
    stored = {"": data, ".gz": gzip.compress(data), ".zst": zstandard.compress(data)}[ending]
    path = tmp_path / f"a.warc{ending}"
    documents, _, counts = read(path, stored)
    assert documents == [
        Document("<p>first</p>", "", (str(path), 3), "w", "http://a/"),
        Document("<p>zweite, für</p>", "", (str(path), 5), "w", "http://b/"),
        Document("plain\ntext 潮", "", (str(path), 7), "w", "http://c/"),
    ]
    assert counts == ReadCounts(files=1, records=8, documents=3, empty=1, not_text=4)


def test_members_of_their_own(tmp_path: Path) -> None:
    """Archives as crawlers write them: each record compressed alone."""
    data = b"".join(gzip.compress(archive([record])) for record in MIXED)
    documents, _, counts = read(tmp_path / "a.warc.gz", data)
    assert [d.origin[1] for d in documents] == [3, 5, 7]
    assert counts.records == 8


def test_a_text_that_looks_like_something_else_is_a_text(tmp_path: Path) -> None:
    texts = [b'{"a": 1}', b"<?xml version='1.0'?><a/>", b"#!/bin/sh\n", b"%PDF-1.4"]
    records = [("conversion", f"http://{i}/", text, {"Content-Type": "text/plain"}) for i, text in enumerate(texts)]
    documents, _, _ = read(tmp_path / "a.wet", archive(records))
    assert [d.text.encode() for d in documents] == texts


def test_a_text_that_is_not_utf8(tmp_path: Path) -> None:
    data = archive([("conversion", "http://a/", b"caf\xe9", {"Content-Type": "text/plain"})])
    with pytest.raises(CorpusError, match=r"a\.wet:1: not UTF-8 at byte 3"):
        read(tmp_path / "a.wet", data)
    _, (line,), _ = read(tmp_path / "a.wet", data, "quarantine")
    assert (line["line"], line["reason"], line["record_base64"]) == (1, "invalid_utf8", "Y2Fm6Q==")
    (document,), _, counts = read(tmp_path / "a.wet", data, invalid_utf8="replace")
    assert (document.text, counts.invalid_utf8_replaced) == ("caf\ufffd", 1)


def test_a_page_of_an_older_encoding_is_decoded(tmp_path: Path) -> None:
    text = "<p>" + "Москва слезам не верит, а приливы приходят и уходят. " * 5 + "</p>"
    (document,), _, _ = read(tmp_path / "a.warc", archive([response("http://a/", text.encode("cp1251"))]))
    assert document.text == text


def test_a_page_that_cannot_be_decoded(tmp_path: Path) -> None:
    data = archive([response("http://a/", bytes(range(128, 256)) * 3), response("http://b/", b"<p>ok</p>")])
    documents, lines, counts = read(tmp_path / "a.warc", data, "quarantine")
    assert documents[-1].text == "<p>ok</p>"
    assert len(documents) + len(lines) == counts.records == 2


@pytest.mark.parametrize("coding", ["gzip", "chunked"])
def test_pages_as_they_were_sent(tmp_path: Path, coding: str) -> None:
    body = b"<p>sent in a coding</p>"
    sent, header = {
        "gzip": (gzip.compress(body), {"Content-Encoding": "gzip"}),
        "chunked": (b"5\r\n<p>se\r\n12\r\nnt in a coding</p>\r\n0\r\n\r\n", {"Transfer-Encoding": "chunked"}),
    }[coding]
    (document,), _, _ = read(tmp_path / "a.warc", archive([response("http://a/", sent)], header))
    assert document.text == body.decode()


def test_a_page_whose_coding_breaks_off_is_not_a_shorter_one(tmp_path: Path) -> None:
    body = gzip.compress(b"".join(b"<p>%d</p>" % (n * n) for n in range(5000)))
    records = [response("http://a/", body[: len(body) // 2]), response("http://b/", gzip.compress(b"<p>b</p>"))]
    records += [response("http://c/", b""), ("request", "http://d/", b"", {})]
    documents, (line,), _ = read(tmp_path / "a.warc", archive(records, {"Content-Encoding": "gzip"}), "quarantine")
    assert [d.text for d in documents] == ["<p>b</p>"]
    assert (line["line"], line["reason"]) == (1, "bad_page")


@pytest.mark.slow
def test_cut_anywhere(tmp_path: Path) -> None:
    """A file that breaks off gives the records that are whole, and says that the rest is not there."""
    data = archive(MIXED)
    whole, _, _ = read(tmp_path / "a.warc", data)
    borders = [len(archive(MIXED[:n])) for n in range(len(MIXED) + 1)]
    for cut in range(0, len(data), 7):
        documents, lines, counts = read(tmp_path / "a.warc", data[:cut], "quarantine")
        assert documents == whole[: len(documents)], cut
        # The two line ends after a record say nothing.
        is_whole = any(border - 4 <= cut <= border for border in borders)
        assert [line["reason"] for line in lines] == ([] if is_whole else ["broken_file"]), cut
        expected = sum(border - 4 <= cut for border in borders[1:])
        assert counts.records - len(lines) == expected, cut


@pytest.mark.parametrize(
    "change",
    [
        (b"Content-Length: 11\r\n", b"Content-Length: 9\r\n"),
        (b"Content-Length: 11\r\n", b"Content-Length: 9999\r\n"),
        (b"Content-Length: 11\r\n", b"Content-Length: many\r\n"),
        (b"Content-Length: 11\r\n", b""),
        (
            b"\r\n\r\nWARC/1.0\r\nWARC-Date: 2026-01-01T00:00:00Z\r\nWARC-Record-ID: <urn:uuid:1>",
            b"\r\n\r\nJUNK\r\na: b",
        ),
    ],
)
def test_records_of_a_wrong_length(tmp_path: Path, change: tuple[bytes, bytes], capfd: Any) -> None:
    data = archive(MIXED)
    assert data.count(change[0]) == 1
    broken = data.replace(*change)
    with pytest.raises(CorpusError, match="broken from here on"):
        read(tmp_path / "a.warc", broken)
    documents, (line,), counts = read(tmp_path / "a.warc", broken, "quarantine")
    assert (documents, line["reason"], counts.records <= 2) == ([], "broken_file", True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("data", [b"not an archive\n" * 20, b"\0" * 100, b"\r\n\r\n\r\n"])
def test_a_file_that_is_no_archive(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CorpusError, match="broken from here on"):
        read(tmp_path / "a.warc", data)


def test_a_torn_archive(tmp_path: Path) -> None:
    data = b"".join(gzip.compress(archive([record])) for record in MIXED)
    documents, (line,), counts = read(tmp_path / "a.warc.gz", data[:-30], "quarantine")
    assert [d.origin[1] for d in documents] == [3, 5, 7]
    assert (line["line"], line["reason"], counts.records) == (8, "broken_file", 8)


@pytest.mark.slow
def test_the_text_of_pages_is_extracted(tmp_path: Path, capfd: Any) -> None:
    records = [response(f"http://{i}/", page(PARAGRAPHS[i % 2])) for i in range(3)]
    records.append(response("http://with a space/", b"<html><body></body></html>"))
    documents, _, counts = read(tmp_path / "a.warc", archive(records), extract="trafilatura")
    assert [d.url for d in documents] == ["http://0/", "http://1/", "http://2/"]
    for i, document in enumerate(documents):
        assert PARAGRAPHS[i % 2] in document.text
        assert "<" not in document.text
        assert "Home | About" not in document.text
    assert documents[0].text == documents[2].text  # a page's text depends on no other page
    assert counts.empty == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_page_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(_: Any, text: str) -> str:
        if "stuck" in text:
            import time

            time.sleep(60)
        if "deadly" in text:
            raise KeyError("deadly")
        return text

    monkeypatch.setattr("datatrove.pipeline.extractors.Trafilatura.extract", slow)
    records = [response(f"http://{name}/", f"<p>{name}</p>".encode()) for name in ("a", "stuck", "deadly", "b")]
    documents, lines, _ = read(
        tmp_path / "a.warc", archive(records), "quarantine", extract="trafilatura", extract_timeout_seconds=0.5
    )
    assert [d.text for d in documents] == ["<p>a</p>", "<p>b</p>"]
    assert [(x["line"], x["reason"]) for x in lines] == [(2, "extraction_timeout"), (3, "extraction_failed")]
    with pytest.raises(CorpusError, match=r":2: its text is not found in 0\.5 s"):
        read(tmp_path / "a.warc", archive(records), extract="trafilatura", extract_timeout_seconds=0.5)
