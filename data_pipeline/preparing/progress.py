"""How far tasks are: each writes a small file now and then; whoever drives them reads these files and shows them."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from data_pipeline.documents import Document

_WRITE_SECONDS = 1.0
_LIVE_SECONDS = 0.5
_LINE_SECONDS = 5.0
_DOCUMENTS_BETWEEN_LOOKS = 64  # at the clock
_ENDED = ("done", "kept", "failed")
Report = Callable[[str], object]


class _Record(Protocol):
    text: str


R = TypeVar("R", bound=_Record)


class Watch:
    """Writes how far one task is."""

    def __init__(self, path: Path):
        self._path = path
        self._documents = self._bytes = 0
        self._written = 0.0

    def documents(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The same documents, counted on their way."""
        for document in documents:
            yield document
            self._count(_size(document.text) + _size(document.prompt))

    def records(self, records: Iterable[R]) -> Iterator[R]:
        """The same records of datatrove, counted on their way."""
        for record in records:
            yield record
            self._count(_size(record.text))

    def _count(self, size: int) -> None:
        self._documents += 1
        self._bytes += size
        if self._documents % _DOCUMENTS_BETWEEN_LOOKS == 0 and time.monotonic() > self._written + _WRITE_SECONDS:
            self.tell("running")

    def tell(self, state: str) -> None:
        """Write the state: running, done, kept or failed."""
        self._written = time.monotonic()
        content = {"state": state, "documents": self._documents, "bytes": self._bytes}
        temporary = self._path.with_suffix(".tmp")
        # It is for people's eyes: not worth an fsync, and no reason to fail.
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(content))
            os.replace(temporary, self._path)


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


@dataclass(frozen=True)
class Stand:
    """How far the tasks of a stage are.

    Attributes:
        done, kept, failed: tasks. documents, bytes: read by the tasks that run or ran.
        weight: of what is finished, kept tasks included, as far as it can be told. kept_weight: of those alone.
    """

    done: int = 0
    kept: int = 0
    failed: int = 0
    documents: int = 0
    bytes: int = 0
    weight: float = 0.0
    kept_weight: float = 0.0


class Board:
    """What the progress files of a stage say.

    Args:
        folder: where they are. weights: of each task; their input in bytes, or 1.
    """

    def __init__(self, folder: Path, weights: Sequence[int]):
        self._folder, self.weights = folder, weights
        self._ended: dict[int, dict[str, Any]] = {}

    def look(self) -> Stand:
        """How far the tasks are now."""
        running = {}
        for name in os.listdir(self._folder) if self._folder.is_dir() else ():
            stem, _, suffix = name.partition(".")
            if suffix == "json" and int(stem) not in self._ended:
                # A file may be replaced while it is read, or be of another file system's yesterday.
                with suppress(OSError, ValueError):
                    running[int(stem)] = json.loads((self._folder / name).read_bytes())
        self._ended |= {task: content for task, content in running.items() if content["state"] in _ENDED}
        return self._sum(self._ended | running)

    def _sum(self, found: dict[int, dict[str, Any]]) -> Stand:
        states = [content["state"] for content in found.values()]
        weights = {task: self.weights[task] * _share(content, self.weights[task]) for task, content in found.items()}
        return Stand(
            done=states.count("done"),
            kept=states.count("kept"),
            failed=states.count("failed"),
            documents=sum(content["documents"] for content in found.values()),
            bytes=sum(content["bytes"] for content in found.values()),
            weight=sum(weights.values()),
            kept_weight=sum(weights[task] for task, content in found.items() if content["state"] == "kept"),
        )


def _share(content: dict[str, Any], weight: int) -> float:
    if content["state"] in ("done", "kept"):
        return 1.0
    return min(content["bytes"] / max(weight, 1), 0.99) if weight > 1 else 0.0


@contextmanager
def shown(board: Board, title: str, report: Report, live: IO[str] | None) -> Iterator[None]:
    """Show how far a stage is while the block runs, and at its end.

    Args:
        report: gets a line every few seconds. live: a terminal, which gets a bar that moves instead.
    """
    ended = threading.Event()
    started = time.monotonic()

    def watch() -> None:
        with _bar(board, title, live) as move:
            while not ended.wait(_LIVE_SECONDS if live else _LINE_SECONDS):
                stand = board.look()
                move(stand) if live else report(_line(board, title, stand, time.monotonic() - started))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        report(_line(board, title, board.look(), time.monotonic() - started))


@contextmanager
def _bar(board: Board, title: str, live: IO[str] | None) -> Iterator[Callable[[Stand], None]]:
    from tqdm import tqdm

    unit: dict[str, Any] = {"unit": "B", "unit_scale": True} if max(board.weights) > 1 else {"unit": " tasks"}
    with tqdm(total=sum(board.weights), desc=title, file=live, disable=live is None, leave=False, **unit) as bar:

        def move(stand: Stand) -> None:
            # The rate is that of this run, which the kept tasks are no part of.
            bar.initial, bar.n = stand.kept_weight, stand.weight
            bar.set_postfix_str(f"{stand.documents:,} documents, {_tasks(board, stand)}")

        yield move


def _tasks(board: Board, stand: Stand) -> str:
    kept = f", {stand.kept:,} of them kept" if stand.kept else ""
    return f"{stand.done + stand.kept:,} of {len(board.weights):,} tasks{kept}"


def _line(board: Board, title: str, stand: Stand, seconds: float) -> str:
    parts = [f"{title}: {_tasks(board, stand)}"]
    if stand.documents:
        parts.append(f"{stand.documents:,} documents, {stand.bytes / max(seconds, 1e-3) / 1e6:.1f} MB/s")
    left, did = sum(board.weights) - stand.weight, stand.weight - stand.kept_weight
    if left >= 1 and did > 0 and not stand.failed:
        parts.append(f"about {_duration(seconds * left / did)} left")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
