"""Clean files: what is left of a task's corpus files after reading and filtering, as datatrove writes it.

A line is a record of datatrove's: the last document of a chat holds the others.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import zstandard
from datatrove.data import Document as Record
from datatrove.pipeline.writers.jsonl import JsonlWriter

from data_pipeline.documents import Document, from_datatrove, to_datatrove

_TASK = "task"
_EARLIER = "earlier"


def write_clean(documents: Iterable[Document], folder: Path, task: int) -> None:
    """Write the clean file of a task."""
    writer = JsonlWriter(str(folder), "${rank}.jsonl", compression="zstd")
    deque(writer.run(_records(documents, task), task), maxlen=0)


def read_clean(folder: Path, task: int) -> Iterator[Record]:
    """The records of a task's clean file; there is no file where there are no records."""
    path = folder / f"{task:05d}.jsonl.zst"
    if path.exists():
        with zstandard.open(path, "rt", encoding="utf-8", newline="\n") as lines:
            for line in lines:
                fields = json.loads(line)
                yield Record(fields["text"], fields["id"], metadata=fields["metadata"])


def _records(documents: Iterable[Document], task: int) -> Iterator[Record]:
    for _, together in groupby(documents, key=lambda d: d.origin):
        *earlier, last = together
        record = to_datatrove(last)
        record.metadata |= {_TASK: task, _EARLIER: [[d.prompt, d.text] for d in earlier]}
        yield record


def documents_of(record: Record) -> list[Document]:
    """The documents of a record."""
    last = from_datatrove(record)
    earlier = [Document(text, prompt, last.origin, last.source, last.url) for prompt, text in record.metadata[_EARLIER]]
    return [*earlier, last]


def document_count(record: Record) -> int:
    """How many documents a record has."""
    return len(record.metadata[_EARLIER]) + 1


def task_of(record: Record) -> int:
    """The task that read a record."""
    return record.metadata[_TASK]
