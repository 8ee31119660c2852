"""datatrove's executor for one machine, with processes that end when their parent does.

datatrove's own `run` starts a manager process that outlives a kill, and shows errors as tracebacks on standard error.
"""

import os
import signal
import traceback
from collections import deque
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import multiprocess
from datatrove.executor.local import LocalPipelineExecutor
from loguru import logger
from multiprocess import connection, forkserver

from data_pipeline.documents import quiet_datatrove
from data_pipeline.errors import UserError
from data_pipeline.preparing.tasks import Task, as_user_error, log_of

# What tasks need is imported once, in the process that they are forked from.
_PRELOADED = ["data_pipeline.preparing.tasks", "data_pipeline.readers.formats", "webdataset"]
_NOT_FIRST = 1  # rank on this machine; the first one's log would go to standard error too


def get_ready() -> None:
    """Start the process that workers are forked from; it imports what they need meanwhile."""
    multiprocess.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    forkserver.ensure_running()


class PoolExecutor(LocalPipelineExecutor):
    """Does the tasks of a stage on this machine, `workers` at a time; one worker is this process itself."""

    def __init__(self, task: Task, tasks: int, workers: int, logs: Path):
        super().__init__([task], tasks, workers, str(logs), skip_completed=False)
        self._task = task
        logs.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Do the tasks. After an error no further one is begun, and those that run are let finish.

        Raises:
            UserError: a task failed; of several, the first task's.
        """
        errors = self._run_here() if self.workers == 1 else self._run_in_processes()
        if errors:
            raise errors[min(errors)]

    def _run_here(self) -> dict[int, UserError]:
        for rank in range(self.tasks):
            error = self.attempt(rank)
            if error:
                return {rank: error}
        return {}

    def attempt(self, rank: int) -> UserError | None:
        """Do a task in this process; its error, if it fails."""
        quiet_datatrove()
        try:
            with open(log_of(self._task.folder, self._task.name, rank), "a") as log, redirect_stderr(log):
                try:
                    self._run_for_rank(rank, _NOT_FIRST)
                except Exception:
                    traceback.print_exc()
                    raise
        except Exception as error:
            return as_user_error(error, self._task.folder, self._task.name, rank)
        finally:
            logger.remove()  # datatrove leaves one that writes to the file that was just closed
        return None

    def _run_in_processes(self) -> dict[int, UserError]:
        get_ready()
        context = multiprocess.get_context("forkserver")
        waiting, errors = deque(range(self.tasks)), dict[int, UserError]()
        running: dict[Any, tuple[Any, int]] = {}
        processes = []
        try:
            for _ in range(self.workers):
                channel, theirs = context.Pipe()
                process = context.Process(target=_in_process, args=(self, theirs), daemon=True)
                process.start()
                processes.append(process)
                theirs.close()
                running[channel] = process, waiting.popleft()
                channel.send(running[channel][1])
            while running:
                for channel in connection.wait(list(running)):
                    process, rank = running.pop(channel)
                    error = self._outcome(channel, process, rank)
                    if error:
                        errors[rank] = error
                    elif waiting and not errors:
                        running[channel] = process, waiting.popleft()
                        channel.send(running[channel][1])
        finally:
            for process in processes:  # they are idle, or someone has interrupted us
                process.kill()
                process.join()
        return errors

    def _outcome(self, channel: Any, process: Any, rank: int) -> UserError | None:
        try:
            return channel.recv()
        except (EOFError, ConnectionResetError):
            process.join()
            return UserError(
                f"{self._task.folder}: task {rank} of {self._task.name} was killed (exit code {process.exitcode}; out "
                f"of memory?); start again, what is finished is kept"
            )


def _in_process(executor: PoolExecutor, channel: Any) -> None:
    """Do one task after the other, as the parent sends their ranks, so that what was learnt of blocks is kept."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries that write past Python
    while True:
        channel.send(executor.attempt(channel.recv()))
