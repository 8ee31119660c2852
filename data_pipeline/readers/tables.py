"""Rows of CSV and Parquet files -> documents."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.readers.csv import CsvReader

from data_pipeline.documents import Document
from data_pipeline.errors import one_line
from data_pipeline.readers.formats import SourceReader
from data_pipeline.readers.records import BadRecordError, decode
from data_pipeline.readers.sources import BrokenFileError

_BATCH_BYTES = 1 << 24
_BATCH_ROWS = 1024
_MAX_FIELD_CHARS = 1 << 30


class CsvRows(SourceReader, CsvReader):
    """Rows whose fields the first row names."""

    def read_file(self, filepath: str) -> Iterator[Document]:
        """The documents of a file, whose rows are counted from 1, the one of the names left out."""
        csv.field_size_limit(_MAX_FIELD_CHARS)
        with self.opened(filepath) as file:
            # Bytes that are not UTF-8 pass through the parser, and are dealt with in the fields that matter.
            stream = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
            lines: list[str] = []
            rows = self._rows(stream, lines)
            header = self._header(next(rows, []))
            for number, row in enumerate(rows, 1):
                self.reading.counts.records += 1
                origin = self.origin(number)
                try:
                    documents = self.documents_of(self._record(header, row), origin)
                except BadRecordError as error:
                    self.reading.bad(origin, error, "".join(lines).encode(errors="surrogateescape"))
                else:
                    yield from documents

    def _rows(self, stream: Iterator[str], lines: list[str]) -> Iterator[list[str] | BadRecordError]:
        """The rows that are not blank, or what is wrong with them; `lines` holds the text of the last one."""
        rows = csv.reader(_remembered(stream, lines), delimiter=self.source.csv_delimiter, strict=True)
        while True:
            lines.clear()
            try:
                row = next(rows, None)
            except csv.Error as error:
                yield BadRecordError("not_csv", f"not CSV ({one_line(error)}); mend the row")
                continue
            if row is None:
                return
            if row:
                yield row

    def _header(self, row: list[str] | BadRecordError) -> list[str]:
        if isinstance(row, BadRecordError):
            raise BrokenFileError(str(row))
        if twice := {name for name in row if row.count(name) > 1} & set(self.parse.fields):
            raise BrokenFileError(f'its first row names "{min(twice)}" twice')
        return row

    def _record(self, header: list[str], row: list[str] | BadRecordError) -> dict[str, str]:
        if isinstance(row, BadRecordError):
            raise row
        if len(row) != len(header):
            what = f"the row has {len(row)} fields, the first row names {len(header)}; mend the row"
            raise BadRecordError("ragged_row", what)
        record = {name: value for name, value in zip(header, row, strict=True) if name in self.parse.fields}
        replaced = False
        for name, value in record.items():
            if not value.isascii():
                data = value.encode(errors="surrogateescape")
                record[name], hit = decode(data, self.source, f'"{name}" is ')
                replaced |= hit
        self.reading.counts.invalid_utf8_replaced += replaced
        return record


def _remembered(stream: Iterator[str], lines: list[str]) -> Iterator[str]:
    for line in stream:
        lines.append(line)
        yield line


class ParquetRows(SourceReader, ParquetReader):
    """Rows of a table."""

    def read_file(self, filepath: str) -> Iterator[Document]:
        """The documents of a file, whose rows are counted from 1."""
        number = 0
        with self.opened(filepath) as file:
            for batch in self._batches(file):
                for record in self._records_of(batch):
                    number += 1
                    self.reading.counts.records += 1
                    origin = self.origin(number)
                    try:
                        if isinstance(record, BadRecordError):
                            raise record
                        documents = self.documents_of(record, origin)
                    except BadRecordError as error:
                        self.reading.bad(origin, error, _as_json(record))
                    else:
                        yield from documents

    def _batches(self, file: BinaryIO) -> Iterator[Any]:
        """The columns that matter, some rows at a time."""
        import pyarrow
        from pyarrow.parquet import ParquetFile

        try:
            with ParquetFile(file, page_checksum_verification=True) as table:
                columns = [name for name in self.parse.fields if name in table.schema_arrow.names]
                groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
                row_bytes = max((g.total_byte_size // max(g.num_rows, 1) for g in groups), default=0)
                rows = min(_BATCH_ROWS, max(1, _BATCH_BYTES // max(row_bytes, 1)))
                # Tasks are what is run at the same time, each on one core.
                yield from table.iter_batches(rows, columns=columns, use_threads=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise BrokenFileError(f"parquet: {one_line(error)}") from None

    def _records_of(self, batch: Any) -> Iterator[dict[str, Any] | BadRecordError]:
        """Rows as records. pyarrow takes strings as they are and fails where they are not UTF-8."""
        try:
            yield from batch.to_pylist()
            return
        except UnicodeDecodeError:
            pass
        for index in range(batch.num_rows):
            try:
                yield self._decoded(batch.slice(index, 1))
            except BadRecordError as error:
                yield error

    def _decoded(self, row: Any) -> dict[str, Any]:
        """A batch of one row as a record, its strings decoded here."""
        import pyarrow

        record: dict[str, Any] = {}
        replaced = False
        for name, column in zip(row.schema.names, row.columns, strict=True):
            is_text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
            if is_text:
                column = column.cast(pyarrow.large_binary())
            try:
                value = column[0].as_py()
            except UnicodeDecodeError as error:
                raise BadRecordError("invalid_utf8", f'"{name}" is not UTF-8 ({error.reason}); mend it') from None
            if is_text and value is not None:
                value, hit = decode(value, self.source, f'"{name}" is ')
                replaced |= hit
            record[name] = value
        self.reading.counts.invalid_utf8_replaced += replaced
        return record


def _as_json(record: Any) -> bytes | None:
    if isinstance(record, BadRecordError):
        return None
    return json.dumps(record, ensure_ascii=False, default=str).encode(errors="replace")
