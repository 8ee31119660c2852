"""Processes of jobs: each leads a process group with all that it starts, and none outlives the program."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from experiments.sources import ROOT

_GRACE_SECONDS = 20.0  # a training that is asked to stop saves a checkpoint first
_LOOK_SECONDS = 0.05


class Process:
    """A command that runs, in a process group of its own. Standard input, a pipe, ends when this program does.

    Args:
        log: what it says is added there.
    """

    def __init__(self, command: Sequence[str], log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._started = time.monotonic()
        with open(log, "ab") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=_environment(), start_new_session=True
            )

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._started

    def ended(self) -> int | None:
        """Its exit code, and what it may have left is killed; none: it runs."""
        code = self._process.poll()
        if code is not None:
            self._send(signal.SIGKILL)
            assert self._process.stdin
            self._process.stdin.close()
        return code

    def ask_to_stop(self) -> None:
        """SIGTERM to its group."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to its group."""
        self._send(signal.SIGKILL)
        self._process.wait()

    def _send(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def stop_all(processes: Iterable[Process]) -> None:
    """Ask all of them to stop, and kill those that go on; a second interrupt kills at once."""
    left = list(processes)
    try:
        for process in left:
            process.ask_to_stop()
        deadline = time.monotonic() + _GRACE_SECONDS
        while any(process.ended() is None for process in left) and time.monotonic() < deadline:
            wait_a_little()
    finally:
        for process in left:
            process.kill()


def wait_a_little() -> None:
    """Between two looks at what runs."""
    time.sleep(_LOOK_SECONDS)


def work_command(what: str, folder: Path) -> list[str]:
    """`python -m experiments.work WHAT FOLDER`."""
    return [sys.executable, "-m", "experiments.work", what, str(folder)]


def _environment() -> Mapping[str, str]:
    """One thread, and the very sources whose hash is in the result."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
