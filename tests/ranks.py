"""Ranks on this machine: started as deepspeed's launcher does, and halted."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).parent.parent
_GRACE_SECONDS = 20.0


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def halt(pid: int) -> None:
    """SIGSTOP a process, and wait until it stands: a thread that wants to run stops only once it has been scheduled."""
    os.kill(pid, signal.SIGSTOP)
    while not all(_stands(thread) for thread in Path(f"/proc/{pid}/task").iterdir()):
        time.sleep(0.01)


def _stands(thread: Path) -> bool:
    try:
        return (thread / "stat").read_text().rpartition(") ")[2].startswith("T")
    except OSError:
        return True  # it has ended meanwhile


class Rank(Protocol):
    """A process, as `subprocess.Popen` has it."""

    def poll(self) -> int | None: ...

    def send_signal(self, sig: int, /) -> None: ...


# Starts a rank: its arguments, the script first, and what its environment has beside this process's.
Start = Callable[[list[str], dict[str, str]], Rank]


def run_ranks(ranks: int, port: str, command: list[str], start: Start) -> int:
    """Start them, wait for them; the exit code of the first that fails, as a shell has it.

    When one fails the others are sent SIGTERM, and killed if they go on.
    """
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_PORT": port}
    shared |= {"MASTER_ADDR": "127.0.0.1", "CROSS_RANK": 0, "CROSS_SIZE": 1}
    script, *arguments = command
    processes = []
    for rank in range(ranks):
        own = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        processes.append(start([script, f"--local_rank={rank}", *arguments], own))
    failed, deadline = 0, float("inf")
    while left := [process for process in processes if process.poll() is None]:
        if not failed and (failed := _first_failure(processes)):
            deadline = time.monotonic() + _GRACE_SECONDS
            _send(left, signal.SIGTERM)
        if time.monotonic() > deadline:
            _send(left, signal.SIGKILL)
        time.sleep(0.05)
    failed = failed or _first_failure(processes)
    return failed if failed >= 0 else 128 - failed


def _first_failure(processes: list[Rank]) -> int:
    return next((code for process in processes if (code := process.poll())), 0)


def _send(processes: list[Rank], number: int) -> None:
    for process in processes:
        process.send_signal(number)
