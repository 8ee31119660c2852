"""Files -> documents, through datatrove's readers.

What theirs leave out with a warning or without one (lines that are not JSON, empty texts, pages that do not decode,
rows of another length, the rest of a file that breaks off) is an error or a bad record here, and counted.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import orjson
from datatrove.io import DataFolder
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.readers.base import BaseDiskReader

from data_pipeline.corpus import CorpusConfig, SourceFile
from data_pipeline.documents import BadRecords, Document, ReadCounts, SideFile, count_reason, quiet_datatrove
from data_pipeline.errors import CorpusError, one_line
from data_pipeline.filters import apply_filters
from data_pipeline.readers.records import BadRecordError, RecordParser, decode, parse_json
from data_pipeline.readers.sources import BrokenFileError, cannot_read, filesystem_of, is_remote, open_source


@dataclass
class Reading:
    """Reads files of a corpus; counts and side files belong to it.

    Attributes:
        names: of the sources.
    """

    config: CorpusConfig
    names: Sequence[str]
    counts: ReadCounts
    quarantine: BadRecords | None = None
    filtered: SideFile | None = None

    def documents(self, files: Sequence[SourceFile]) -> Iterator[Document]:
        """The documents of files; see `corpus.read_files`."""
        quiet_datatrove()
        read = self._without_empty(files)
        for document in apply_filters(self.config, read, self.counts, self.filtered, self._filter_failed):
            self.counts.documents += 1
            yield document

    def bad(self, origin: tuple[str, int], error: BadRecordError, record: bytes | None = None) -> None:
        """Deal with a malformed record as the configuration says.

        Raises:
            CorpusError: it says that such a record is an error.
        """
        file, number = origin
        if self.config.on_bad_record == "error":
            where = f"{file}:{number}" if number else file
            raise CorpusError(f"{where}: {error} (or set corpus.on_bad_record to quarantine)")
        count_reason(self.counts.bad_records, error.reason)
        if self.quarantine is not None:
            self.quarantine.add(file, number, error.reason, str(error), record)

    def _filter_failed(self, document: Document, why: str) -> None:
        error = BadRecordError("filter_failed", f"a filter failed ({why}); mend the record or drop the filter")
        self.bad(document.origin, error, (document.prompt + document.text).encode())

    def _without_empty(self, files: Sequence[SourceFile]) -> Iterator[Document]:
        readers: dict[int, SourceReader] = {}
        for file in files:
            if file.source not in readers:
                readers[file.source] = _reader(self, file.source)
            self.counts.files += 1
            for document in readers[file.source].read(file):
                if document.text or document.prompt:
                    yield document
                else:
                    self.counts.empty += 1


def _reader(reading: Reading, index: int) -> "SourceReader":
    kind = reading.config.sources[index].format
    try:
        if kind in ("csv", "parquet"):
            from data_pipeline.readers.tables import CsvRows, ParquetRows

            return CsvRows(reading, index) if kind == "csv" else ParquetRows(reading, index)
        if kind == "warc":
            from data_pipeline.readers.warc import WarcRecords

            return WarcRecords(reading, index)
        return TextFiles(reading, index) if kind == "text" else JsonlRecords(reading, index)
    except ImportError as error:
        raise CorpusError(f"corpus.sources.{index} (format {kind}): {one_line(error)}") from None


class SourceReader(BaseDiskReader):
    """What our readers share. `read_file` gives our documents, not datatrove's."""

    def __init__(self, reading: Reading, index: int):
        self.reading = reading
        self.source = reading.config.sources[index]
        self.parse = RecordParser(reading.config, index, reading.names[index])
        self.fs = filesystem_of(self.source)
        super().__init__(DataFolder("/", fs=self.fs))
        self._folder = "/"
        self.file = SourceFile("", index, 0)

    def read(self, file: SourceFile) -> Iterator[Document]:
        """The documents of a file.

        Raises:
            CorpusError: it is unreadable or malformed.
        """
        folder, _, name = (file.path if is_remote(file.path) else os.path.abspath(file.path)).rpartition("/")
        if folder != self._folder:
            # fsspec would keep one instance for each folder for ever.
            self.data_folder = DataFolder(folder or "/", fs=self.fs, skip_instance_cache=True)
            self._folder = folder
        self.file = file
        records = self.reading.counts.records
        try:
            yield from self.read_file(name)
        except BrokenFileError as error:
            self.reading.counts.records += 1
            bad = BadRecordError("broken_file", f"the file is broken from here on ({error}); mend it or copy it anew")
            number = self.reading.counts.records - records if error.number is None else error.number
            self.reading.bad(self.origin(number), bad)

    def origin(self, number: int) -> tuple[str, int]:
        """Where a record of the file is."""
        return (self.file.path, number)

    def opened(self, filepath: str) -> BinaryIO:
        """The file's bytes, decompressed."""
        try:
            file = self.data_folder.open(filepath, "rb")
        except Exception as error:  # clients raise what their libraries raise
            raise cannot_read(self.file.path, error) from None
        return open_source(file, self.file.path, self.file.bytes)

    def decoded(self, data: bytes) -> str:
        """The text of a record, counted if invalid UTF-8 in it was replaced.

        Raises:
            BadRecordError: it is not UTF-8.
        """
        text, replaced = decode(data, self.source)
        self.reading.counts.invalid_utf8_replaced += replaced
        return text

    def documents_of(self, record: Any, origin: tuple[str, int]) -> Sequence[Document]:
        """The documents of a record.

        Raises:
            BadRecordError: it has none.
        """
        documents = self.parse(record, origin)
        self.reading.counts.further_turns += len(documents) - 1
        return documents


class TextFiles(SourceReader):
    """Files that are documents."""

    name = "Text"

    def read_file(self, filepath: str) -> Iterator[Document]:
        """The document of a file."""
        try:
            with self.opened(filepath) as file:
                data = file.read()
        except BrokenFileError as error:
            error.number = 0
            raise
        self.reading.counts.records += 1
        try:
            text = self.decoded(data)
        except BadRecordError as error:
            self.reading.bad(self.origin(0), error, data)
        else:
            yield Document(text, "", self.origin(0), self.reading.names[self.file.source])


class JsonlRecords(SourceReader, JsonlReader):
    """Lines that are JSON objects."""

    def read_file(self, filepath: str) -> Iterator[Document]:
        """The documents of a file, whose lines are counted from 1; blank ones are no records."""
        number = 0
        try:
            with self.opened(filepath) as file:
                for number, line in enumerate(file, 1):
                    yield from self._line(number, line)
        except BrokenFileError as error:
            error.number = number + 1
            raise

    def _line(self, number: int, line: bytes) -> Sequence[Document]:
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            if not line.decode(errors="replace").strip():
                return ()
            record = None
        self.reading.counts.records += 1
        origin = (self.file.path, number)
        try:
            return self.documents_of(record or self._carefully(line), origin)
        except BadRecordError as error:
            self.reading.bad(origin, error, line)
            return ()

    def _carefully(self, line: bytes) -> Any:
        """What a line holds that the fast parser refuses: NaN, invalid UTF-8 that is replaced, or nothing."""
        return parse_json(self.decoded(line))
