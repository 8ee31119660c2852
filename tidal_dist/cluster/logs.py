"""RUN/logs/rank-NNNNN-HOST.log: what each rank writes to standard output and error, whatever launcher started it.

The rank's file descriptors 1 and 2 become pipes to a process of its own, which writes everything to the file and to
where it went before. It is this file, run as a script; it ends when the last process that writes into the pipes has
ended. So the last words of a rank that was killed are in the file, and nobody who ends the rank's processes ends it.
"""

import os
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

LOGS = "logs"
_CHUNK = 65536
_TAIL_BYTES = 32768
_SETTLE_SECONDS = 2.0


def log_file(run: Path, rank: int, host: str) -> Path:
    """Where the log of a rank is."""
    return run / LOGS / f"rank-{rank:05d}-{re.sub(r'[^A-Za-z0-9.-]', '_', host)}.log"


def keep_log(run: Path) -> Callable[[], None]:
    """Write what this process says from now on to its rank's log too; where that cannot be, say so and go on.

    Returns:
        what ends that and waits, some seconds at most, until everything is where it belongs: whoever waits for this
        process may read its output as soon as it has ended.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    host = socket.gethostname()
    path = log_file(run, rank, host)
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            file.write(f"=== {now}: rank {rank} of {world} starts on {host}, process {os.getpid()}\n".encode())
            return _divert(file.fileno())
    except OSError as error:
        print(f"{path}: cannot write ({error.strerror}); no log of this rank is kept", file=sys.stderr, flush=True)
        return lambda: None


def _divert(file: int) -> Callable[[], None]:
    """Have a process write to `file`, and to where they go now, what this one writes to descriptors 1 and 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    before = [os.dup(number) for number in (1, 2)]
    pipes = [os.pipe() for _ in (1, 2)]
    writes, ends = os.pipe()  # it ends when that process does
    try:
        readers = [reader for reader, _ in pipes]
        # Nothing of this environment: by it a launch's processes are found, and killed.
        subprocess.run(
            [sys.executable, "-I", "-S", __file__, *map(str, [file, *readers])],
            pass_fds=[file, *readers, ends],
            stdin=subprocess.DEVNULL,
            env={},
            check=True,
        )
        for target, (_, writer) in zip((1, 2), pipes, strict=True):
            os.dup2(writer, target)
    except subprocess.CalledProcessError:
        raise OSError(0, "its writer does not start") from None
    finally:
        for end in (ends, *(end for pipe in pipes for end in pipe)):
            os.close(end)
    return partial(_settle, before, writes)


def _settle(before: Sequence[int], writes: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for number, descriptor in enumerate(before, 1):
        pipe = os.fstat(number)
        # Whatever has kept a duplicate, as DeepSpeed does of standard error.
        for each in map(int, os.listdir("/dev/fd")):
            with suppress(OSError):
                if os.path.samestat(os.fstat(each), pipe):
                    os.dup2(descriptor, each)
    select.select([writes], [], [], _SETTLE_SECONDS)


def last_lines(path: Path, most: int) -> list[str]:
    """The last lines of a rank's latest start; [] where there is no log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    begun = max((n for n, line in enumerate(lines) if line.startswith("=== ")), default=-1)
    return [line for line in lines[begun + 1 :] if line.strip()][-most:]


def _copy(file: int, readers: list[int]) -> None:
    """Copy until the pipes have ended. A disk that is full or a terminal that is gone must not disturb the rank."""
    targets = {reader: [file, number] for number, reader in enumerate(readers, 1)}
    while targets:
        for reader in select.select(list(targets), [], [])[0]:
            content = os.read(reader, _CHUNK)
            if not content:
                del targets[reader]
            for target in targets.get(reader, []):
                with suppress(OSError):
                    _write(target, content)


def _write(target: int, content: bytes) -> None:
    while content:
        try:
            content = content[os.write(target, content) :]
        except BlockingIOError:
            select.select([], [target], [], 1.0)


if __name__ == "__main__":
    # A grandchild in a session of its own, so that it is nobody's child and gets nobody's signals.
    if os.fork() == 0:
        os.setsid()
        _copy(int(sys.argv[1]), [int(number) for number in sys.argv[2:]])
    os._exit(0)
