"""A task: one unit of a preparation, done once whoever does it and however often it is started.

It holds a lock, believes its receipt only where the files agree, works in a scratch folder, moves what it wrote to its
place, and writes the receipt last. Killed at any moment and started again it writes the same bytes.
"""

import errno
import os
import shutil
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from data_pipeline.errors import UserError
from data_pipeline.files import replace_file
from data_pipeline.preparing.assignment import Assignment, Stage
from data_pipeline.preparing.job import Job, hash_of, is_published
from data_pipeline.preparing.locks import exclusive
from data_pipeline.preparing.progress import Watch
from data_pipeline.preparing.receipts import Receipt, outputs_in
from data_pipeline.preparing.stages import stages_of

# A task that was killed may hold its lock for a moment more.
_PATIENCE_SECONDS = 5.0


class Task(PipelineStep):
    """The tasks of one stage, as a step of a datatrove pipeline: rank i does task i.

    Args:
        folder: the work folder. stop_early: leave tasks undone when another one has failed.
    """

    type = "tidal"

    def __init__(self, folder: Path, stage: str, stop_early: bool = False):
        self.name = stage
        super().__init__()
        self.folder, self.stop_early = folder, stop_early

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:  # noqa: ARG002
        """Do task `rank`, unless its outputs are there and good.

        Raises:
            UserError: what only the user can mend; it is also written to the task's error file.
        """
        end_with_parent()
        job = Job.load(self.folder)
        if job is None:
            raise UserError(f"{self.folder}: holds no preparation; start `tidal prepare` again")
        os.chdir(job.content["directory"])  # where relative paths lead from
        if is_published(job.folder, job.target) or (self.stop_early and self._has_failed()):
            return
        stage = next(s for s in stages_of(job) if s.name == self.name)
        try:
            with exclusive(job.path("locks", self.name, rank), _place(self.folder, self.name, rank), _PATIENCE_SECONDS):
                do(job, stage, rank)
        except Exception as error:
            _record(self.folder, self.name, rank, error)
            raise

    def _has_failed(self) -> bool:
        folder = error_of(self.folder, self.name, 0).parent
        return folder.exists() and any(folder.iterdir())


def do(job: Job, stage: Stage, task: int) -> None:
    """Do a task whose lock is held, unless its outputs are there and good."""
    error_of(job.folder, stage.name, task).unlink(missing_ok=True)
    watch = Watch(job.path("progress", stage.name, task, ".json"))
    watch.tell("running")
    try:
        inputs = _inputs(job, stage, task)
        receipt = Receipt.read(job, stage.name, task)
        keep = receipt is not None and receipt.inputs == inputs and receipt.holds(job.folder)
        if not keep:
            _work(job, stage, task, inputs, watch)
        if stage.afterwards:
            stage.afterwards(job)
    except BaseException:
        watch.tell("failed")
        raise
    watch.tell("kept" if keep else "done")


def _work(job: Job, stage: Stage, task: int, inputs: str, watch: Watch) -> None:
    path = job.path("receipts", stage.name, task, ".json")
    path.unlink(missing_ok=True)
    scratch = job.path("scratch", stage.name, task)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        result = stage.work(Assignment(job, task, scratch, watch))
        outputs = outputs_in(scratch)
        for name in outputs:
            place = job.folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(scratch / name, place)
        Receipt(inputs, outputs, result).write(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _inputs(job: Job, stage: Stage, task: int) -> str:
    """Hash of all that a task's outputs depend on."""
    needed = []
    for name, other in stage.needs(task):
        receipt = Receipt.read(job, name, other)
        if receipt is None:
            raise UserError(f"{_place(job.folder, name, other)}: is not done, and {stage.name} needs it; start again")
        needed.append(receipt.made)
    return hash_of([job.settings_hash, stage.name, task, stage.reads(task), needed])


def _record(folder: Path, stage: str, task: int, error: Exception) -> None:
    """Leave the error where whoever started the task finds it; a full disk may forbid it."""
    with suppress(UserError):
        replace_file(error_of(folder, stage, task), str(as_user_error(error, folder, stage, task)).encode())


def as_user_error(error: Exception, folder: Path, stage: str, task: int) -> UserError:
    """An error of a task as one line."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space or choose another folder" if full else "check the folder"
        return UserError(f"{error.filename or folder}: cannot write ({error.strerror}); {remedy}")
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return UserError(
        f"{_place(folder, stage, task)}: {what}; a fault of the program, see {log_of(folder, stage, task)}"
    )


def _place(folder: Path, stage: str, task: int) -> str:
    return f"{folder}: task {task} of {stage}"


def log_of(folder: Path, stage: str, task: int) -> Path:
    """Where a task's traceback and what libraries write go."""
    return folder / "logs" / stage / f"{task:05d}.log"


def error_of(folder: Path, stage: str, task: int) -> Path:
    """Where a task leaves its error, in one line."""
    return folder / "errors" / stage / f"{task:05d}"


@cache
def end_with_parent() -> None:
    """Let this process, if it was started to do tasks, end when the one that started it has ended."""
    import multiprocess

    parent = multiprocess.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
