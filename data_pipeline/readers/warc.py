"""WARC files -> documents: the text of web pages, and the texts of WET files."""

import io
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, BinaryIO

from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.extractors.base import ExtractorSandbox
from datatrove.pipeline.readers import WarcReader
from datatrove.pipeline.readers.warc import process_record
from warcio.archiveiterator import ArchiveIterator
from warcio.exceptions import ArchiveLoadFailed

from data_pipeline.documents import Document
from data_pipeline.errors import one_line
from data_pipeline.readers.formats import Reading, SourceReader
from data_pipeline.readers.records import BadRecordError
from data_pipeline.readers.sources import BrokenFileError

_PAGES = ("text/html", "application/xhtml+xml")
_RESPONSES = ("response", "conversion")  # what a server sent, and what was made of it: the records of WET files


class _Archive(ArchiveIterator):
    """Writes nothing to stderr about records of a wrong length; `err_count` tells of them."""

    INC_RECORD = ""


class _Steps:
    """Reads a stream in the steps that it gives, so that what comes before a tear is not lost with it."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def read(self, size: int) -> bytes:
        return self._file.read1(size)  # type: ignore[attr-defined]


class WarcRecords(SourceReader, WarcReader):
    """Pages of an archive."""

    def __init__(self, reading: Reading, index: int):
        super().__init__(reading, index)
        for library in ("warcio", "trafilatura"):  # they warn of each odd address and page
            logging.getLogger(library).setLevel(logging.CRITICAL)
        # Its own removal of duplicates compares with the pages read before: the result must depend on the page alone.
        self._trafilatura = Trafilatura(deduplicate=False)

    def read_file(self, filepath: str) -> Iterator[Document]:
        """The documents of a file, whose records are counted from 1, those that hold no page included."""
        sandbox = ExtractorSandbox(self.source.extract_timeout_seconds)
        with self.opened(filepath) as file, sandbox if self.source.extract != "none" else nullcontext() as extractor:
            # Headers of HTTP are parsed here: the iterator takes a response without them for the file's end.
            archive = _Archive(_Steps(file), no_record_parse=True)
            for number, record in enumerate(self._whole(archive), 1):
                content, is_whole = _content(archive, record)
                self.reading.counts.records += 1
                try:
                    if not is_whole:
                        raise BadRecordError("bad_page", "its content-encoding breaks off; drop the page")
                    document = self._document(record, content, self.origin(number), extractor)
                except BadRecordError as error:
                    self.reading.bad(self.origin(number), error, content)
                else:
                    if document is not None:
                        yield document

    def _whole(self, archive: _Archive) -> Iterator[Any]:
        try:
            yield from archive
        except (ArchiveLoadFailed, ValueError) as error:
            raise BrokenFileError(f"warc: {one_line(error)}") from None

    def _document(
        self, record: Any, content: bytes, origin: tuple[str, int], extractor: ExtractorSandbox | None
    ) -> Document | None:
        """The document of a record; none where it holds no page."""
        kind = record.rec_type
        if kind not in _RESPONSES:
            self.reading.counts.not_text += 1
            return None
        # Texts are UTF-8, pages come in any encoding, which datatrove finds out.
        url = record.rec_headers.get_header("WARC-Target-URI") or record.rec_headers.get_header("uri") or ""
        name = self.reading.names[self.file.source]
        if kind == "conversion" and _media_type(record, content) == "text/plain":
            return Document(self.decoded(content), "", origin, name, url)
        page = self._page(record, content)
        if page is None:
            return None
        return Document(page if extractor is None else self._extracted(page, extractor), "", origin, name, url)

    def _page(self, record: Any, content: bytes) -> str | None:
        """The HTML of a record; none, and counted, where it holds something else."""
        media_type = _media_type(record, content)
        record.content_stream = lambda: io.BytesIO(content)
        try:
            page = process_record(record)
        except Exception as error:  # old headers that are not there, encodings that Python does not know
            raise BadRecordError("bad_page", f"the record cannot be read ({one_line(error)})") from None
        if page is not None:
            return page["text"]
        if media_type in _PAGES:
            raise BadRecordError("unknown_encoding", "the page's encoding cannot be told; mend it")
        self.reading.counts.not_text += 1
        return None

    def _extracted(self, page: str, extractor: ExtractorSandbox) -> str:
        try:
            return extractor.process_document(page, self._extract) or ""
        except TimeoutError:
            what = f"its text is not found in {self.source.extract_timeout_seconds} s; raise extract_timeout_seconds"
            raise BadRecordError("extraction_timeout", what) from None
        except Exception as error:  # trafilatura's own, or the death of its process
            what = f"its text cannot be found ({type(error).__name__}: {one_line(error)}); drop the page"
            raise BadRecordError("extraction_failed", what) from None

    def _extract(self, page: str) -> str | Exception | None:
        # The sandbox raises in this process what its process returns; raised there, it would end that one.
        try:
            return self._trafilatura.extract(page)
        except Exception as error:
            return error


def _content(archive: _Archive, record: Any) -> tuple[bytes, bool]:
    """The payload of a record, and whether its content-encoding, if it has one, came to its end.

    Raises:
        BrokenFileError: it breaks off, or its length is not what its header says.
    """
    length = record.rec_headers.get_header("Content-Length") or record.rec_headers.get_header("length") or ""
    if not length.isdigit():
        raise BrokenFileError("warc: a record does not say its length")
    uri = record.rec_headers.get_header("WARC-Target-URI") or record.rec_headers.get_header("uri") or ""
    try:
        record.http_headers = archive.loader.load_http_headers(record.rec_type, uri, record.raw_stream, record.length)
    except (EOFError, ValueError):
        record.http_headers = None
    stream = record.content_stream()
    content = stream.read() if record.rec_type in _RESPONSES else b""  # others may be large, and are not looked at
    archive.read_to_end()
    if record.raw_stream.limit:
        raise BrokenFileError(f"warc: a record ends {record.raw_stream.limit} bytes early")
    if archive.err_count:
        raise BrokenFileError("warc: a record is longer than it says")
    # There is no decompressor any more where the content was not what its header says, and was left as it is.
    return content, not content or getattr(getattr(stream, "decompressor", None), "eof", True)


def _media_type(record: Any, content: bytes) -> str:
    """What a record holds: as its headers say, or as its bytes look like."""
    import magic

    known = record.rec_headers.get_header("WARC-Identified-Payload-Type")
    if not known and record.rec_type == "conversion":
        known = (record.content_type or "").partition(";")[0].strip()
    return known or magic.from_buffer(content, mime=True)
