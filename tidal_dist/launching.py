"""Training as processes: started through the deepspeed launcher, watched, killed; none outlives its block."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

from tidal_dist.cluster.discovery import place

TRAIN = Path(__file__).parents[1] / "launch" / "train.py"
_GRACE_SECONDS = 15.0


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def local_ranks(ranks: int) -> list[str]:
    """The launcher's arguments for so many ranks on this machine, beside whatever else runs here."""
    return ["--num_gpus", str(ranks), "--master_port", str(free_port())]


def training_command(
    config: Path | str, arguments: Sequence[str], launcher: Sequence[str], script: Path = TRAIN
) -> list[str]:
    """`deepspeed LAUNCHER... launch/train.py --config CONFIG ARGUMENTS...`."""
    deepspeed = Path(sys.executable).parent / "deepspeed"
    return [str(deepspeed), *launcher, str(script), "--config", str(config), *arguments]


def command_on_this_machine(config: Path | str, arguments: Sequence[str], ranks: int) -> list[str]:
    """The same for so many ranks on this machine."""
    return training_command(config, arguments, local_ranks(ranks))


class Launch:
    """A training that runs, in a session of its own; at the end of the block every process of it is dead.

    Args:
        command: of `training_command`. output: what its standard output and error go to: a file, or a pipe.
        folder: where it works. environment: of the launcher.

    Attributes:
        process: the launcher.
    """

    def __init__(
        self,
        command: Sequence[str],
        output: IO[str] | int,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        # What every process of this launch ends with, wherever a launcher for clusters has started it.
        self._signature = list(command[command.index("--config") :])
        self._is_clustered = "--hostfile" in command
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process.poll() is None and self._is_clustered:
            # The launcher ends the ranks on other hosts too, which nobody else could.
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_GRACE_SECONDS)
        self.kill()

    def ranks(self) -> dict[int, psutil.Process]:
        """The rank processes on this host, by rank."""
        found = {p.pid: p for p in self.processes() if _is_rank(p)}
        return {_rank_of(p): p for p in found.values() if p.ppid() not in found}

    def kill_rank(self, rank: int) -> None:
        """SIGKILL one rank of this host, as the kernel does when memory runs out."""
        with contextlib.suppress(psutil.NoSuchProcess, KeyError):
            self.ranks()[rank].kill()

    def kill(self) -> None:
        """SIGKILL everything on this host, launchers and children of ranks included."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        while left := self.processes():
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=0.2)

    def wait(self, timeout: float) -> int:
        """The launcher's exit code.

        Raises:
            subprocess.TimeoutExpired: it runs on after `timeout` seconds.
        """
        return self.process.wait(timeout)

    def processes(self) -> list[psutil.Process]:
        """Whatever of this launch lives on this host."""
        return [p for p in psutil.process_iter() if self._is_mine(p)]

    def _is_mine(self, process: psutil.Process) -> bool:
        try:
            if process.pid == self.process.pid and self.process.returncode is not None:
                return False  # the number may be another's by now
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            return os.getsid(process.pid) == self.process.pid or self._signature == _tail(process, self._signature)
        except (psutil.Error, ProcessLookupError, PermissionError):
            return False


def _tail(process: psutil.Process, like: list[str]) -> list[str]:
    return process.cmdline()[-len(like) :]


def _is_rank(process: psutil.Process) -> bool:
    """Whether it runs the training itself: `python -u launch/train.py ...`."""
    with contextlib.suppress(psutil.Error):
        return str(TRAIN) in process.cmdline()[1:3]
    return False


def _rank_of(process: psutil.Process) -> int:
    found = place(process.environ())
    return found.rank if found else 0
