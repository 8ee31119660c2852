"""Corpus -> tokeniser -> shards with their row plan, in one folder that appears whole.

The work is cut into stages of tasks (`stages`), which run on one machine, on Ray or on Slurm (`executors`). What is
finished is kept: a preparation that failed or was killed goes on where it was when it is started again.
"""

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_pipeline.corpus import CorpusConfig, SourceFile, list_files
from data_pipeline.documents import quiet_datatrove
from data_pipeline.errors import ShardError, UserError
from data_pipeline.preparing.assignment import Stage
from data_pipeline.preparing.executors import DEFAULT, PrepareConfig, local_workers, ray_cluster, run_on_ray
from data_pipeline.preparing.job import Job, clear, into_tasks, is_published, key_of, lock_of, settings_of
from data_pipeline.preparing.locks import exclusive
from data_pipeline.preparing.pool import PoolExecutor, get_ready
from data_pipeline.preparing.progress import Board, Report, shown
from data_pipeline.preparing.stages import stages_of
from data_pipeline.preparing.tasks import Task, error_of
from data_pipeline.segmentation import SegmentationConfig
from data_pipeline.shards import DataConfig, Manifest
from data_pipeline.tokenizer import TokenizerConfig


@dataclass(frozen=True)
class Request:
    """What is to be prepared, and how.

    Attributes:
        resolved_config: is stored beside the shards. engine: how the work is shared out.
        overwrite: replace shards that are already there. restart: begin anew, whatever an unfinished one left.
    """

    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    segmentation: SegmentationConfig
    data: DataConfig
    resolved_config: str
    engine: PrepareConfig = DEFAULT
    overwrite: bool = False
    restart: bool = False

    @property
    def target(self) -> Path:
        """The folder of the shards."""
        if "://" in self.data.shards:
            raise ShardError(f"{self.data.shards}: shards are prepared in a folder; choose one, then copy it there")
        return Path(self.data.shards)

    @property
    def folder(self) -> Path:
        """The work folder."""
        return self.target.with_name(f".{self.target.name}.partial")

    @property
    def settings(self) -> dict[str, Any]:
        """What the result depends on, beside the corpus files."""
        return settings_of(self.corpus, self.tokenizer, self.segmentation, self.data, self.engine.task_bytes)

    def tasks(self) -> list[list[SourceFile]]:
        """The corpus files in tasks."""
        return into_tasks(list_files(self.corpus), self.engine.task_bytes)


@dataclass(frozen=True)
class Prepared:
    """Finished shards, and how many tasks of each stage were done now or kept from earlier."""

    manifest: Manifest
    tasks: dict[str, dict[str, int]]


def prepare(
    corpus: CorpusConfig,
    tokenizer_config: TokenizerConfig,
    segmentation: SegmentationConfig,
    data: DataConfig,
    resolved_config: str,
    overwrite: bool = False,
    report: Report = bool,
    engine: PrepareConfig = DEFAULT,
) -> Manifest:
    """Write the shards of a corpus: `run` with its arguments one by one."""
    request = Request(corpus, tokenizer_config, segmentation, data, resolved_config, engine, overwrite)
    return run(request, report).manifest


def run(request: Request, report: Report = bool, live: IO[str] | None = None) -> Prepared:
    """Write the shards of a corpus, on this machine or on Ray.

    Everything is written to a folder beside `data.shards`, which then takes its name. A failure leaves what was there
    before, and keeps what is finished for the next start.

    Args:
        report: gets lines for the user, also from another thread. live: a terminal to draw progress on.

    Raises:
        CorpusError, TokenizerError, ShardError, UserError: the input is missing or malformed, shards are already there,
            there is an unfinished preparation of something else or in another process, or the disk is full.
    """
    quiet_datatrove()
    tasks = {}
    with opened(request) as job:
        if job is not None:
            with _machine(request.engine, job):
                for stage in stages_of(job):
                    tasks[stage.name] = _run_stage(job, stage, request.engine, report, live)
        return finished(request, tasks)


def _machine(engine: PrepareConfig, job: Job) -> AbstractContextManager[None]:
    """What the stages run on, made ready."""
    if engine.executor == "ray":
        return ray_cluster(engine.ray)
    if local_workers(engine, len(job.tasks), job.input_bytes) > 1:
        get_ready()
    return nullcontext()


def finished(request: Request, tasks: dict[str, dict[str, int]]) -> Prepared:
    """The published shards; the work folder, which this process holds, is removed."""
    _remove(request.folder)
    return Prepared(Manifest.load(request.target), tasks)


@dataclass(frozen=True)
class StageStatus:
    """How many tasks a stage has, how many left a receipt, and what went wrong, by task."""

    tasks: int
    done: int
    errors: dict[int, str]


def status(request: Request) -> dict[str, StageStatus]:
    """How far an unfinished preparation is, by stage; nothing where there is none. Looks without a lock."""
    job = Job.load(request.folder)
    if job is None or is_published(request.folder, request.target):
        return {}
    return {
        stage.name: StageStatus(
            stage.tasks,
            sum(job.path("receipts", stage.name, task, ".json").exists() for task in range(stage.tasks)),
            dict(_errors(job, stage)),
        )
        for stage in stages_of(job)
    }


@contextmanager
def opened(request: Request) -> Iterator[Job | None]:
    """Hold the work folder alone; the preparation in it, or None where its shards have just been published.

    Raises:
        UserError: as `run`.
    """
    target, folder = request.target, request.folder
    if not (request.overwrite or is_published(folder, target)):
        _refuse_existing(target)
    tasks, settings = request.tasks(), request.settings
    try:
        with exclusive(lock_of(folder), str(target)):
            try:
                yield _described(request, tasks, settings)
            finally:
                if folder.exists() and Job.load(folder) is None and not is_published(folder, target):
                    _remove(folder)
    except OSError as error:
        raise UserError(
            f"{error.filename or target}: cannot write ({error.strerror or error}); free space or choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            folder.rmdir()  # where it is empty


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise ShardError(f"{target}: already there; remove it, choose another data.shards, or give --overwrite")


def _described(request: Request, tasks: list[list[SourceFile]], settings: dict[str, Any]) -> Job | None:
    """The preparation in the work folder: that of an earlier start, if it is of the same, or a new one."""
    target, folder = request.target, request.folder
    job, key = Job.load(folder), key_of(settings, tasks)
    if is_published(folder, target):
        if job is not None and job.content["key"] == key:
            return None
        if not request.overwrite:
            _refuse_existing(target)
        job = None
    if job is None or request.restart:
        clear(folder)
    else:
        job.check_settings(settings)
    job = Job.write(folder, target, settings, tasks, request.resolved_config, request.overwrite)
    # What an earlier start left that says nothing of this one.
    stale = [path for path in folder.glob("between-*") if path != job.between]
    for path in [*stale, folder / "progress", folder / "errors"]:
        shutil.rmtree(path, ignore_errors=True)
    return job


def _remove(folder: Path) -> None:
    """Empty the work folder, its lock included, which this process holds; it goes itself when the lock is released."""
    clear(folder)
    lock_of(folder).unlink(missing_ok=True)


def _run_stage(job: Job, stage: Stage, engine: PrepareConfig, report: Report, live: IO[str] | None) -> dict[str, int]:
    weights = [max(task["bytes"], 1) for task in job.tasks] if stage.reads_corpus else [1] * stage.tasks
    board = Board(job.folder / "progress" / stage.name, weights)
    logs = job.folder / "logs" / stage.name
    try:
        with shown(board, stage.title, report, live):
            if engine.executor == "ray":
                run_on_ray(engine, Task(job.folder.resolve(), stage.name, stop_early=True), stage.tasks, logs.resolve())
                _check_remote(job, stage)
            else:
                workers = local_workers(engine, stage.tasks, job.input_bytes)
                PoolExecutor(Task(job.folder, stage.name), stage.tasks, workers, logs).run()
    except UserError:
        report(f"what is finished is kept in {job.folder}, with logs in {logs}; start again to go on")
        raise
    stand = board.look()
    return {"done": stand.done, "kept": stand.kept}


def _check_remote(job: Job, stage: Stage) -> None:
    """Raise what a task that ran elsewhere has left as its error."""
    for _, error in _errors(job, stage):
        raise UserError(error)
    for task in range(stage.tasks):
        if not job.path("receipts", stage.name, task, ".json").exists():
            raise UserError(f"{job.folder}: task {task} of {stage.name} ended without a result; start again")


def _errors(job: Job, stage: Stage) -> Iterator[tuple[int, str]]:
    for task in range(stage.tasks):
        with suppress(FileNotFoundError):
            yield task, error_of(job.folder, stage.name, task).read_text()
