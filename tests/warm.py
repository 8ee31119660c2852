"""Ranks that are forked from a process which has imported what training imports: seconds less for each.

`Training` has it start them; run as a script, with a socket's descriptor, it is that process.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from tests.ranks import ROOT, environment, run_ranks
from tidal_dist import processes
from tidal_dist.launching import TRAIN, Launch

_LONGEST_MESSAGE = 1 << 20


class Training:
    """Ranks of a script in a session of their own; what `subprocess.Popen` has, as far as tests use it.

    Args:
        arguments: the script's. environment: of the ranks; limits on files are those of this process.
        output: what they write to; none: `communicate` returns it.

    Attributes:
        pid: of the session and of the process that waits for the ranks. args: what was started.
    """

    def __init__(
        self,
        script: Path,
        arguments: Sequence[str],
        ranks: int,
        port: int,
        environment: dict[str, str],
        output: IO[str] | None = None,
    ):
        self._output = output or tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.args = [str(script), *arguments]
        self.returncode: int | None = None
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        request = {"ranks": ranks, "port": str(port), "command": self.args, "environment": environment, "limit": limit}
        self.pid: int = _ask(request, [self._output.fileno()])

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.02)
        return code

    def communicate(self, timeout: float = 300) -> tuple[str, None]:
        """What they wrote, once they have ended."""
        self.wait(timeout)
        self._output.seek(0)
        return self._output.read(), None

    def kill(self) -> None:
        """SIGKILL all of them."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(60)


class WarmLaunch(Launch):
    """Like `Launch`, of the same command for this machine; but ranks are forked, without the deepspeed launcher."""

    def __init__(self, command: Sequence[str], output: IO[str]):
        self._signature, self._is_clustered = list(command[command.index("--config") :]), False
        ranks, port = (int(command[command.index(name) + 1]) for name in ("--num_gpus", "--master_port"))
        arguments = command[command.index(str(TRAIN)) + 1 :]
        self.process = Training(TRAIN, arguments, ranks, port, environment(), output)

    def ranks(self) -> dict[int, psutil.Process]:
        return dict(enumerate(sorted(processes.below(self.process.pid), key=lambda p: p.pid)))


@functools.cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-u", __file__, str(theirs.fileno())]
    subprocess.Popen(command, env=environment(), cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    return ours


def _ask(request: dict[str, Any], descriptors: Sequence[int] = ()) -> Any:
    socket.send_fds(_server(), [json.dumps(request).encode()], descriptors)
    return json.loads(_server().recv(_LONGEST_MESSAGE))


class _Forked:
    """A child of this process that runs a script."""

    def __init__(self, arguments: list[str], own: dict[str, str]):
        self._code: int | None = None
        self._pid = os.fork()
        if not self._pid:
            os.environ |= own
            sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
            with _ending_process():
                runpy.run_path(arguments[0], run_name="__main__")

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self._pid, number)


@contextlib.contextmanager
def _ending_process():  # type: ignore[no-untyped-def]
    """The process ends with the block, whatever happens in it."""
    code = 1
    try:
        yield
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _lead(request: dict[str, Any], output: int) -> None:
    """What the process does that waits for the ranks."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ |= request["environment"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    sys.exit(run_ranks(request["ranks"], request["port"], request["command"], _Forked))


def _serve(connection: socket.socket) -> None:
    while True:
        message, descriptors, *_ = socket.recv_fds(connection, _LONGEST_MESSAGE, 1)
        if not message:
            return
        request = json.loads(message)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = _fork_leader(connection, request, descriptors[0])
        connection.send(json.dumps(answer).encode())


def _fork_leader(connection: socket.socket, request: dict[str, Any], output: int) -> int:
    """The process that waits for the ranks, which has a session of its own already, so that all can be killed."""
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        with _ending_process():
            os.setsid()
            connection.close()
            for descriptor in (reader, writer):
                os.close(descriptor)
            _lead(request, output)
    os.close(writer)
    os.read(reader, 1)  # until the other end is closed
    for descriptor in (reader, output):
        os.close(descriptor)
    return pid


# What a rank imports until it ends.
_MODULES = (
    "deepspeed.ops",
    "matplotlib.pyplot",
    "tidal_dist.run_report.page",
    "tidal_dist.training.start",
    "torch._dynamo",
    "torch.distributed.elastic.multiprocessing",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
)


if __name__ == "__main__":
    for module in _MODULES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # so that collections of the ranks copy no page of it
    _serve(socket.socket(fileno=int(sys.argv[1])))
