"""Where the tasks of a preparation run: on this machine, on Slurm or on Ray, through datatrove's executors."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from data_pipeline.errors import UserError
from data_pipeline.section import Section

if TYPE_CHECKING:
    from datatrove.executor.slurm import SlurmPipelineExecutor

_RAY_ANSWERS_SECONDS = 10.0
_BYTES_PER_WORKER = 16_000_000  # less input than this is done before another process has started


class SlurmConfig(Section):
    """How jobs are submitted."""

    partition: str
    time: str = Field("24:00:00", description="limit of a task")
    cpus_per_task: int = Field(1, ge=1, description="a task uses one; more buy memory")
    mem_per_cpu_gb: int = Field(2, ge=1)
    qos: str | None = None
    max_array_size: int = Field(1001, ge=1, description="largest job array that the cluster takes")
    tasks_per_job: int = Field(1, ge=1, description="tasks that a job does one after the other")
    env_command: str | None = Field(None, description="shell line that readies a node; none: this Python on the PATH")
    sbatch_args: dict[str, str] = Field(default_factory=dict, description="further options of sbatch, without --")


class RayConfig(Section):
    """The cluster that is asked."""

    address: str = Field("auto", description="of a running cluster; auto: RAY_ADDRESS, or one on this machine")
    cpus_per_task: int = Field(1, ge=1)
    mem_per_cpu_gb: float = Field(1.0, gt=0.0, description="memory that a task reserves")


class PrepareConfig(Section):
    """How `tidal prepare` shares out its work. Only `task_bytes` changes what is written."""

    executor: Literal["local", "slurm", "ray"] = "local"
    workers: int | None = Field(None, ge=1, description="tasks at a time; none: one a core, on Slurm no limit")
    task_bytes: int = Field(128_000_000, ge=1, description="input of a task, about; a file is never divided")
    slurm: SlurmConfig | None = None
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "PrepareConfig":
        if self.executor == "slurm" and self.slurm is None:
            raise ValueError("executor slurm needs the section slurm, with its partition")
        return self

    def of_result(self) -> "PrepareConfig":
        """The part that the result depends on, for its `config.yaml`."""
        return PrepareConfig(task_bytes=self.task_bytes)


DEFAULT = PrepareConfig()


def local_workers(config: PrepareConfig, tasks: int, input_bytes: int) -> int:
    """Processes for `tasks` tasks on this machine: as many as asked for, else its cores if there is work for them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(config.workers or min(cores, 1 + input_bytes // _BYTES_PER_WORKER), tasks)


@contextmanager
def ray_cluster(config: RayConfig) -> Iterator[None]:
    """Be connected to a Ray cluster while the block runs.

    Raises:
        UserError: there is none.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    try:
        _check_answers(config.address)
        ray.init(config.address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError) as error:
        raise UserError(
            f"prepare.ray.address={config.address}: no cluster ({' '.join(str(error).split())}); start one with "
            f"`ray start --head`, or correct the address"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray ends the whole process where nothing answers at a host and port."""
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host, int(port)), _RAY_ANSWERS_SECONDS).close()


def run_on_ray(config: PrepareConfig, step: Any, tasks: int, logs: Path) -> None:
    """Do the tasks 0..tasks-1 of a datatrove step on the cluster that this process is connected to."""
    import ray
    from datatrove.executor.ray import RayPipelineExecutor

    cores = int(ray.cluster_resources().get("CPU", 1))
    RayPipelineExecutor(
        [step],
        tasks,
        workers=config.workers or max(cores // config.ray.cpus_per_task, 1),
        skip_completed=False,  # tasks look at their receipts and at what they wrote
        logging_dir=str(logs),
        cpus_per_task=config.ray.cpus_per_task,
        mem_per_cpu_gb=config.ray.mem_per_cpu_gb,
    ).run()


def slurm_executor(
    config: PrepareConfig, step: Any, tasks: int, logs: Path, job_name: str, after: "SlurmPipelineExecutor | None"
) -> "SlurmPipelineExecutor":
    """An executor whose `launch_job` submits the tasks, to start when all of `after` have succeeded."""
    from datatrove.executor.slurm import SlurmPipelineExecutor

    assert config.slurm is not None
    slurm = config.slurm
    return SlurmPipelineExecutor(
        [step],
        tasks,
        time=slurm.time,
        partition=slurm.partition,
        cpus_per_task=slurm.cpus_per_task,
        mem_per_cpu_gb=slurm.mem_per_cpu_gb,
        workers=config.workers or -1,
        job_name=job_name,
        qos=slurm.qos,
        env_command=slurm.env_command or f'export PATH="{Path(sys.executable).parent}:$PATH"',
        # What waits for a task that failed would otherwise wait for ever.
        sbatch_args={"kill-on-invalid-dep": "yes"} | slurm.sbatch_args,
        max_array_size=slurm.max_array_size,
        tasks_per_job=slurm.tasks_per_job,
        depends=after,
        skip_completed=False,
        logging_dir=str(logs),
    )
