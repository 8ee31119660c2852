"""Corpus files -> documents: JSON lines and plain text."""

import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from pydantic import Field

from data_pipeline.errors import CorpusError
from data_pipeline.section import Section


class SourceConfig(Section):
    """A set of files of one kind."""

    path: str = Field(description="a file, a folder or a glob; {stdlib} stands for Python's standard library folder")
    format: Literal["jsonl", "text"] = Field(description="jsonl: one JSON object a line; text: a file is a document")
    exclude: list[str] = Field(default_factory=list, description="globs of paths to leave out")
    invalid_utf8: Literal["error", "replace", "skip"] = Field(
        "error", description="what to do with a file or line that is not UTF-8; what is not an error is counted"
    )


class CorpusConfig(Section):
    """What the shards are made of."""

    sources: list[SourceConfig] = Field(min_length=1)
    validation_fraction: float = Field(0.01, ge=0.0, lt=1.0, description="share of documents held out, by their hash")


@dataclass(frozen=True)
class Document:
    """One document: `prompt` is context, `text` is supervised. `origin` says where it came from: file, line or 0."""

    text: str
    prompt: str
    origin: tuple[str, int]


@dataclass
class ReadCounts:
    """What was read and what was not, so that nothing disappears unseen."""

    files: int = 0
    documents: int = 0
    empty: int = 0
    invalid_utf8_replaced: int = 0
    invalid_utf8_skipped: int = 0


def files_of(source: SourceConfig) -> list[Path]:
    """The files of a source, sorted.

    Raises:
        CorpusError: there are none.
    """
    pattern = source.path.replace("{stdlib}", sysconfig.get_path("stdlib"))
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "**")
    elif os.path.isfile(pattern):
        pattern = glob.escape(pattern)
    found = sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    kept = [Path(p) for p in found if not any(fnmatch(p, e) for e in source.exclude)]
    if not kept:
        why = "there is no such file" if not found else "corpus.sources.exclude leaves out every file"
        raise CorpusError(f"{source.path}: {why}; check corpus.sources")
    return kept


def read_documents(config: CorpusConfig, counts: ReadCounts) -> Iterator[Document]:
    """All documents of a corpus, in a fixed order; empty ones are only counted.

    Raises:
        CorpusError: a file is missing, unreadable or malformed.
    """
    for source in config.sources:
        for path in files_of(source):
            counts.files += 1
            for document in _read_file(path, source, counts):
                if document.text or document.prompt:
                    counts.documents += 1
                    yield document
                else:
                    counts.empty += 1


def _read_file(path: Path, source: SourceConfig, counts: ReadCounts) -> Iterator[Document]:
    try:
        with open(path, "rb") as file:
            if source.format == "text":
                text = _decode(file.read(), str(path), source, counts)
                if text is not None:
                    yield Document(text, "", (str(path), 0))
                return
            for number, line in enumerate(file, 1):
                text = _decode(line, f"{path}:{number}", source, counts)
                if text is not None and text.strip():
                    yield _parse_record(text, path, number)
    except OSError as error:
        raise CorpusError(f"{path}: cannot read ({error.strerror}); check the file and its permissions") from None


def _decode(data: bytes, where: str, source: SourceConfig, counts: ReadCounts) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if source.invalid_utf8 == "replace":
            counts.invalid_utf8_replaced += 1
            return data.decode(errors="replace")
        if source.invalid_utf8 == "skip":
            counts.invalid_utf8_skipped += 1
            return None
        raise CorpusError(
            f"{where}: not UTF-8 at byte {error.start}; mend it, or set the source's invalid_utf8 to replace or skip"
        ) from None


def _parse_record(line: str, path: Path, number: int) -> Document:
    where = f"{path}:{number}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise CorpusError(f"{where}: not JSON ({error}); every line must be one JSON object") from None
    except RecursionError:
        raise CorpusError(f"{where}: JSON nested too deeply; every line must be one flat JSON object") from None
    keys = {"prompt", "answer"} if isinstance(record, dict) and "prompt" in record else {"text"}
    if not isinstance(record, dict) or not keys <= set(record):
        raise CorpusError(f'{where}: needs the fields "text", or "prompt" and "answer"')
    for key in sorted(keys):
        if not isinstance(record[key], str):
            raise CorpusError(f'{where}: "{key}" must be a string, not {type(record[key]).__name__}')
        if any("\ud800" <= character <= "\udfff" for character in record[key]):
            raise CorpusError(f'{where}: "{key}" holds half of a surrogate pair, which no UTF-8 can hold; mend it')
    if keys == {"text"}:
        return Document(record["text"], "", (str(path), number))
    if not record["answer"]:
        raise CorpusError(f'{where}: "answer" is empty; nothing would be learned from it')
    return Document(record["answer"], record["prompt"], (str(path), number))
