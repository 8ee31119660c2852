"""What a corpus is made of: its sources, their files, and the documents that are read from them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from data_pipeline.documents import BadRecords, Document, ReadCounts, SideFile
from data_pipeline.duplicates import DedupConfig
from data_pipeline.errors import CorpusError
from data_pipeline.filters import FilterConfig
from data_pipeline.readers.sources import list_source
from data_pipeline.section import Section


class SourceConfig(Section):
    """A set of files of one kind, with records of one kind.

    A record is `{"text"}`, `{"prompt", "answer"}` or a chat, `{"messages": [{"role", "content"}, ...]}`, by the field
    that it has; the fields may have other names.
    """

    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_.-]+$", description="names the source where sources are mixed; none: from its path"
    )
    path: str = Field(
        description="a file, a folder or a glob (** crosses folders), or their fsspec URL such as s3://bucket/folder; "
        "{stdlib} stands for Python's standard library folder; files ending in .gz or .zst are decompressed"
    )
    format: Literal["jsonl", "text", "parquet", "csv", "warc"] = Field(
        description="jsonl: one JSON object a line; text: a file is a document; parquet; csv: the first row names the "
        "fields; warc: web pages, or the texts of a WET file"
    )
    exclude: list[str] = Field(default_factory=list, description="globs of paths to leave out")
    storage_options: dict[str, Any] = Field(
        default_factory=dict,
        description="passed to the fsspec client of a URL, such as endpoint_url; secrets belong in the environment",
    )
    invalid_utf8: Literal["error", "replace"] = Field(
        "error", description="error: what is not UTF-8 is a bad record; replace: by U+FFFD, and counted"
    )
    text_field: str = "text"
    prompt_field: str | None = Field("prompt", description="none: there is no such field")
    answer_field: str = "answer"
    messages_field: str | None = Field("messages", description="none: there is no such field")
    role_field: str = Field("role", description="of a message")
    content_field: str = Field("content", description="of a message")
    assistant_role: str = Field("assistant", description="the role whose messages are supervised")
    url_field: str = Field("url", description="where a document comes from, for filters and deduplication by URL")
    csv_delimiter: str = Field(",", min_length=1, max_length=1)
    extract: Literal["trafilatura", "none"] = Field(
        "trafilatura", description="how the text of a WARC file's pages is found; none: their HTML is the text"
    )
    extract_timeout_seconds: float = Field(30.0, gt=0.0, description="a page that takes longer is a bad record")


class CorpusConfig(Section):
    """What the shards are made of."""

    sources: list[SourceConfig] = Field(min_length=1)
    validation_fraction: float = Field(0.01, ge=0.0, lt=1.0, description="share of documents held out, by their hash")
    on_bad_record: Literal["error", "quarantine"] = Field(
        "error",
        description="error: stop at a malformed record; quarantine: copy it to a side file with the reason, count it",
    )
    filters: list[FilterConfig] = Field(
        default_factory=list, description="tried in this order on prompt and text; the first to refuse is counted"
    )
    keep_filtered: bool = Field(False, description="write what the filters refuse to a side file")
    dedup: DedupConfig = DedupConfig()
    chat_template: str = Field(
        "### {role}\n{content}\n\n",
        description="a message of a chat in a prompt, which ends with what stands before {content} in the answer's own",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "CorpusConfig":
        if self.chat_template.count("{content}") != 1:
            raise ValueError("chat_template must hold {content} once")
        names = [s.name for s in self.sources if s.name]
        if twice := {n for n in names if names.count(n) > 1}:
            raise ValueError(f"sources must have different names, {min(twice)} occurs more than once")
        return self


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus: path or URL, index of its source, and its size in bytes as it is stored."""

    path: str
    source: int
    bytes: int


def source_name(config: CorpusConfig, index: int) -> str:
    """The name of a source, different from all others: its own, or made from its path."""
    return _source_names(config)[index]


def _source_names(config: CorpusConfig) -> list[str]:
    taken = {s.name for s in config.sources if s.name}
    names: list[str] = []
    for source in config.sources:
        name = source.name or _name_of(source.path)
        number = 1
        while not source.name and name in taken:
            number += 1
            name = f"{_name_of(source.path)}-{number}"
        taken.add(name)
        names.append(name)
    return names


def _name_of(path: str) -> str:
    parts = [p for p in path.replace("{stdlib}", "stdlib").rpartition("://")[2].split("/") if p]
    plain = [p for p in parts if not any(c in p for c in "*?[")] or ["source"]
    stem = plain[-1].lstrip(".").partition(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-") or "source"


def files_of(source: SourceConfig, index: int = 0) -> list[SourceFile]:
    """The files of a source, sorted by path.

    Args:
        index: of the source in its corpus.

    Raises:
        CorpusError: there are none, or they cannot be listed.
    """
    return [SourceFile(path, index, size) for path, size in list_source(source)]


def list_files(config: CorpusConfig) -> list[SourceFile]:
    """The files of all sources, one source after the other.

    Raises:
        CorpusError: a source has none, or they cannot be listed.
    """
    return [file for index, source in enumerate(config.sources) for file in files_of(source, index)]


def read_files(
    config: CorpusConfig,
    files: Sequence[SourceFile],
    counts: ReadCounts,
    quarantine: BadRecords | None = None,
    filtered: SideFile | None = None,
) -> Iterator[Document]:
    """The documents of some files of a corpus, in order, without the empty ones and those that filters refuse.

    Clients of remote files are opened here, so that a process may call it that was forked.

    Args:
        counts: what became of every record is added to it.
        quarantine: where malformed records are copied if `on_bad_record` says so; none: they are only counted.
        filtered: where refused documents are copied if `keep_filtered` says so.

    Raises:
        CorpusError: a file is unreadable or malformed, or a filter lacks what it needs.
    """
    try:
        from data_pipeline.readers.formats import Reading
    except ModuleNotFoundError as error:
        raise CorpusError(f"reading a corpus needs {error.name}; install tidal-dist with the extra `data`") from None
    reading = Reading(config, _source_names(config), counts, quarantine, filtered)
    yield from reading.documents(files)


def read_documents(config: CorpusConfig, counts: ReadCounts) -> Iterator[Document]:
    """All documents of a corpus, in a fixed order; see `read_files`.

    Raises:
        CorpusError: a file is missing, unreadable or malformed.
    """
    yield from read_files(config, list_files(config), counts)
