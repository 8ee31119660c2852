"""Processes of this host that have not ended."""

from contextlib import suppress
from typing import Literal

import psutil

# The variable by which the processes of a launch on several hosts are known, whatever started them.
LAUNCH_ID = "TIDAL_LAUNCH_ID"


def state(pid: int) -> Literal["living", "halted"] | None:
    """Whether a process runs, or was halted by a signal or a debugger; none: it has ended."""
    with suppress(psutil.Error):
        status = psutil.Process(pid).status()
        if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
            return "halted"
        return None if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else "living"
    return None


def below(pid: int, recursive: bool = False) -> list[psutil.Process]:
    """The processes that a process has started; recursive: and those that they have started, and so on."""
    with suppress(psutil.Error):
        return [p for p in psutil.Process(pid).children(recursive) if state(p.pid)]
    return []


def variable(process: psutil.Process, name: str) -> str | None:
    """A variable of the environment that a process was started with."""
    with suppress(psutil.Error):
        return process.environ().get(name)
    return None
