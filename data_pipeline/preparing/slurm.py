"""Preparing on Slurm: whoever asks submits the jobs of all stages, and looks in again later."""

import json
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.documents import quiet_datatrove
from data_pipeline.errors import UserError
from data_pipeline.files import replace_file
from data_pipeline.prepare import Prepared, Request, finished, opened
from data_pipeline.preparing.executors import slurm_executor
from data_pipeline.preparing.job import Job
from data_pipeline.preparing.progress import Report
from data_pipeline.preparing.stages import stages_of
from data_pipeline.preparing.tasks import Task

_JOBS = "jobs.json"


@dataclass(frozen=True)
class Submitted:
    """The jobs that Slurm works at: by stage, the id of its (last) job array."""

    jobs: dict[str, str]


def submit(request: Request, report: Report = bool) -> Prepared | Submitted:
    """Submit the jobs of a preparation, unless they are queued or running, or have finished it.

    Raises:
        UserError: as `prepare.run`, or Slurm does not answer.
    """
    quiet_datatrove()
    jobs = _recorded(request.folder)
    if jobs and _are_alive(jobs):
        return Submitted(_unchanged(request, jobs))
    with opened(request) as job:
        if job is None:
            return finished(request, {})
        if jobs:
            report("the jobs ended before the shards were finished; they are submitted again, and do what is missing")
        try:
            return Submitted(_submit(request, job, report))
        except (OSError, subprocess.CalledProcessError) as error:
            _cancel(_recorded(request.folder))
            raise UserError(f"sbatch: cannot submit ({error}); nothing is queued") from None


def _submit(request: Request, job: Job, report: Report) -> dict[str, str]:
    jobs: dict[str, str] = {}
    executor = None
    folder = job.folder.resolve()  # jobs find it wherever they start
    for stage in stages_of(job):
        logs, name = folder / "logs" / stage.name, f"{job.target.name}-{stage.name}"
        executor = slurm_executor(request.engine, Task(folder, stage.name), stage.tasks, logs, name, executor)
        executor.launch_job()
        jobs[stage.name] = str(executor.job_id)
        replace_file(job.folder / _JOBS, json.dumps(jobs).encode())
        report(f"{stage.title}: job {executor.job_id}, {stage.tasks:,} tasks, output in {logs / 'slurm_logs'}")
    return jobs


def _recorded(folder: Path) -> dict[str, str]:
    try:
        return json.loads((folder / _JOBS).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _are_alive(jobs: dict[str, str]) -> bool:
    command = ["squeue", "--noheader", "--format=%i", f"--jobs={','.join(jobs.values())}"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("squeue: not found; start this where Slurm's commands are") from None
    if result.returncode and "Invalid job id" not in result.stderr:
        raise UserError(f"squeue: {' '.join(result.stderr.split())}; try again when Slurm answers")
    return bool(result.stdout.strip())


def _unchanged(request: Request, jobs: dict[str, str]) -> dict[str, str]:
    """The jobs that are alive, if they do what is asked for.

    Raises:
        UserError: they do something else.
    """
    job = Job.load(request.folder)
    if request.restart:
        raise UserError(f"{request.folder}: its jobs are alive; `scancel {' '.join(jobs.values())}` before --restart")
    if job is not None:
        job.check_settings(request.settings)
    return jobs


def _cancel(jobs: dict[str, str]) -> None:
    with suppress(OSError):
        subprocess.run(["scancel", *jobs.values()], capture_output=True)
