"""Locks over a folder that several processes or machines share: held by one, and released when its process ends."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from data_pipeline.errors import UserError

_PAUSE_SECONDS = 0.05


@contextmanager
def exclusive(path: Path, what: str, patience_seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` alone; `what` names in the error what only one process may do.

    Args:
        patience_seconds: how long to wait for the process that holds it.

    Raises:
        UserError: another process holds it.
    """
    deadline = time.monotonic() + patience_seconds
    while (file := _try(path)) is None:
        if time.monotonic() >= deadline:
            raise UserError(f"{what}: {_holder(path)} is at it; wait until it has ended, or stop it")
        time.sleep(_PAUSE_SECONDS)
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(file)


def _try(path: Path) -> int | None:
    """The open lock file, or None where another process holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # the holder removes the folder
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder may have removed the folder while this process waited; a lock on a removed file locks nothing.
        if os.path.samestat(os.fstat(file), os.stat(path)):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(file)
    return None


def _holder(path: Path) -> str:
    try:
        since = datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")
        return f"{path.read_text() or 'another process'} since {since}"
    except OSError:
        return "another process"
