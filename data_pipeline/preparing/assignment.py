"""What a stage of a preparation asks of its tasks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.preparing.job import Job
from data_pipeline.preparing.progress import Watch


@dataclass(frozen=True)
class Assignment:
    """What a task is to do: task number `task` of a stage, into the empty folder `scratch`, told to `watch`."""

    job: Job
    task: int
    scratch: Path
    watch: Watch

    @property
    def shards(self) -> Path:
        """What it writes here ends up among the shards."""
        return self.scratch / "shards"

    @property
    def between(self) -> Path:
        """What it writes here ends up where later stages find it."""
        return self.scratch / self.job.between.name


def _nothing(_: int) -> list[tuple[str, int]]:
    return []


@dataclass(frozen=True)
class Stage:
    """Tasks of one kind; all of them are done before those of the next stage begin.

    Attributes:
        title: what the user reads. tasks: how many.
        work: does a task and returns what is to be remembered of it, as JSON.
        reads: what of the corpus a task depends on. needs: the tasks of earlier stages that it depends on.
        reads_corpus: whether its tasks are those of the corpus, so that progress is measured in their bytes.
        afterwards: done when the task is.
    """

    name: str
    title: str
    tasks: int
    work: Callable[[Assignment], dict[str, Any]]
    reads: Callable[[int], Any] = _nothing
    needs: Callable[[int], list[tuple[str, int]]] = _nothing
    reads_corpus: bool = False
    afterwards: Callable[[Job], None] | None = None
