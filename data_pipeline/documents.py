"""Documents, the counts of what was read, and side files for what was not kept."""

import base64
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from data_pipeline.files import whole_file

if TYPE_CHECKING:
    import datatrove.data


@dataclass(frozen=True)
class Document:
    """One document: `prompt` is context, `text` is supervised.

    `origin` says where it came from: a path or URL, and the number of the line or record there, from 1, or 0 for a
    whole file. The assistant's turns of one chat have one origin. `source` is the name of its source.
    """

    text: str
    prompt: str
    origin: tuple[str, int]
    source: str = ""
    url: str = ""


@dataclass
class ReadCounts:
    """What became of every record, so that nothing disappears unseen: `unaccounted` is 0."""

    files: int = 0
    records: int = 0  # lines, rows, WARC records, whole text files; a file that breaks off counts as one more
    documents: int = 0  # what is left when everything below is taken away
    further_turns: int = 0  # documents that chats gave beyond the first of each
    empty: int = 0
    not_text: int = 0  # WARC records that hold no page: requests, metadata, images
    invalid_utf8_replaced: int = 0
    edited_by_filters: int = 0
    bad_records: dict[str, int] = field(default_factory=dict)  # by reason
    filtered: dict[str, int] = field(default_factory=dict)  # by filter and reason

    @property
    def unaccounted(self) -> int:
        """Records of which nobody knows where they went."""
        gone = self.empty + self.not_text + sum(self.bad_records.values()) + sum(self.filtered.values())
        return self.records + self.further_turns - self.documents - gone

    def add(self, other: "ReadCounts | Mapping[str, Any]") -> None:
        """Add what another reader, or `asdict` of its counts, has counted."""
        theirs = other if isinstance(other, Mapping) else vars(other)
        for name, value in theirs.items():
            if isinstance(value, Mapping):
                for reason, count in value.items():
                    count_reason(getattr(self, name), reason, count)
            else:
                setattr(self, name, getattr(self, name) + value)


def count_reason(counts: dict[str, int], reason: str, count: int = 1) -> None:
    """Count `reason` once more, or `count` times."""
    counts[reason] = counts.get(reason, 0) + count


class SideFile:
    """JSON lines beside the corpus's documents. The file appears whole when it is closed, and only if it has lines."""

    def __init__(self, path: Path):
        self._path = path
        self._stack = ExitStack()
        self._file: BinaryIO | None = None

    def write(self, fields: Mapping[str, Any]) -> None:
        """Add a line."""
        if self._file is None:
            self._file = self._stack.enter_context(whole_file(self._path))
        self._file.write(json.dumps(fields, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        """Let the file appear; what an earlier run wrote there goes where there was nothing to write."""
        if self._file is None:
            self._path.unlink(missing_ok=True)
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:  # what is half written disappears
            self._stack.__exit__(kind, error, trace)


class BadRecords(SideFile):
    """The side file of malformed records."""

    def add(self, file: str, line: int, reason: str, what: str, record: bytes | None) -> None:
        """Copy a record, as text if it is UTF-8 and in base64 otherwise.

        Args:
            record: its bytes, or none where the file breaks off before they are known.
        """
        fields: dict[str, Any] = {"file": file, "line": line, "reason": reason, "what": what}
        try:
            fields["record"] = record if record is None else record.decode()
        except UnicodeDecodeError:
            assert record is not None
            fields["record_base64"] = base64.b64encode(record).decode()
        self.write(fields)


def quiet_datatrove() -> None:
    """Keep datatrove from writing its log to stderr; what matters of it is counted here."""
    from loguru import logger

    logger.disable("datatrove")


def to_datatrove(document: Document) -> "datatrove.data.Document":
    """A document as datatrove's: its text is prompt and text joined, the rest is in its metadata."""
    from datatrove.data import Document as Theirs

    file, line = document.origin
    metadata = {
        "prompt_chars": len(document.prompt),
        "file": file,
        "line": line,
        "source": document.source,
        "url": document.url,
    }
    return Theirs(text=document.prompt + document.text, id=f"{file}:{line}", metadata=metadata)


def from_datatrove(document: "datatrove.data.Document") -> Document:
    """What `to_datatrove` was given, also after datatrove wrote the document and read it again."""
    metadata = document.metadata
    cut = metadata["prompt_chars"]
    origin = (metadata["file"], metadata["line"])
    return Document(document.text[cut:], document.text[:cut], origin, metadata["source"], metadata["url"])
