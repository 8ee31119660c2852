"""One start of a command that starts ranks: waits for it, hands signals on to the ranks, leaves none of them behind."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import IO, Protocol

from data_pipeline.errors import UserError
from tidal_dist import processes
from tidal_dist.training.interrupts import STOP_SIGNALS

TOO_LONG = 124  # as `timeout` has it
_TICK_SECONDS = 0.2
_ORPHANS_SECONDS = 10.0
_PROSPECTS = (
    "the ranks save and stop; a second one ends them at once",
    "the ranks end at once; a third one kills everything",
    "killing everything",
)


class Ranks(Protocol):
    """The ranks that a command has started, wherever they are.

    Attributes:
        by_command: whether signals reach them through the command, which must take them then.
    """

    by_command: bool

    def look(self, launcher: int) -> None:
        """See what there is, some times a second. launcher: the command's process."""

    def hand_on(self, signals: Sequence[signal.Signals]) -> None:
        """Give each rank those signals that it has not been given."""

    def are_living(self) -> bool:
        """Whether there are ranks although the command has ended."""

    def failed(self) -> int | None:
        """The exit code where some of them have ended in a way that the command may not notice."""

    def end(self, patience: float) -> None:
        """Leave none behind; what is about to end by itself has so many seconds."""


class RanksHere:
    """The ranks on this host: the topmost processes below the command that have a local rank."""

    by_command = False

    def __init__(self) -> None:
        self._ranks: set[int] = set()
        self._heard: dict[int, int] = {}  # how many of the signals each rank has been sent

    def look(self, launcher: int) -> None:
        """See what there is."""
        below = processes.below(launcher, recursive=True)
        ranks = [p for p in below if processes.variable(p, "LOCAL_RANK") is not None]
        inner = {child.pid for rank in ranks for child in processes.below(rank.pid)}
        self._ranks |= {rank.pid for rank in ranks if rank.pid not in inner}

    def hand_on(self, signals: Sequence[signal.Signals]) -> None:
        """Give each rank what it has not been given."""
        for pid in sorted(self._living()):
            for received in signals[self._heard.get(pid, 0) :]:
                send(pid, received)
            self._heard[pid] = len(signals)

    def are_living(self) -> bool:
        """Whether there are any."""
        return bool(self._living())

    def failed(self) -> int | None:
        """The launcher notices on this host."""
        return None

    def end(self, patience: float) -> None:
        """Kill what the launcher should have ended, after some time."""
        deadline = time.monotonic() + patience
        while self._living() and time.monotonic() < deadline:
            time.sleep(_TICK_SECONDS)
        for pid in self._living():
            send(pid, signal.SIGKILL)

    def _living(self) -> set[int]:
        return {pid for pid in self._ranks if processes.state(pid)}


class RanksOfSrun(RanksHere):
    """Those that srun has started on other hosts: srun passes SIGUSR1 on, and answers other signals itself."""

    by_command = True

    def __init__(self) -> None:
        super().__init__()
        self._srun, self._passed = 0, 0

    def look(self, launcher: int) -> None:
        """See what there is."""
        self._srun = launcher

    def hand_on(self, signals: Sequence[signal.Signals]) -> None:
        """Have srun pass on what it has not been given."""
        for _ in signals[self._passed :]:
            send(self._srun, signal.SIGUSR1)
        self._passed = len(signals)


class Attempt:
    """One start.

    Args:
        ranks: those that the command starts. environment: of the command.
        output: what its standard output and error go to; none: where those of this process go.
        limit_seconds: after which it is ended with the code `TOO_LONG`; none: never.
    """

    def __init__(
        self,
        command: list[str],
        ranks: Ranks,
        environment: Mapping[str, str] | None = None,
        output: IO[bytes] | None = None,
        limit_seconds: float | None = None,
    ):
        self.command, self._ranks = command, ranks
        self._environment, self._output = os.environ | dict(environment or {}), output
        self._limit_seconds = limit_seconds
        self._signals: list[signal.Signals] = []

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return bool(self._signals)

    def run(self) -> int:
        """Start, wait, hand signals on; the command's exit code, as a shell has it.

        Raises:
            UserError: there is no such command.
        """
        say("$ " + shlex.join(self.command))
        process, began = self._started(), time.monotonic()
        failed = None
        try:
            while process.poll() is None or (self.requested and self._ranks.are_living()):
                self._ranks.look(process.pid)
                if received := wait_for_signal(_TICK_SECONDS):
                    self._signals.append(received)
                    say(f"{received.name}: handed on; " + _PROSPECTS[min(len(self._signals), len(_PROSPECTS)) - 1])
                self._ranks.hand_on(self._signals)
                failed = self._ranks.failed()
                if self._limit_seconds is not None and time.monotonic() - began > self._limit_seconds:
                    failed = TOO_LONG
                if failed is not None or self._is_over():
                    break
        finally:
            self._ranks.end(0.0 if self._is_over() else _ORPHANS_SECONDS)
            _kill(process)
        code = process.wait() if failed is None else failed
        return code if code >= 0 else 128 - code

    def _is_over(self) -> bool:
        """Whether everything is to be killed."""
        return len(self._signals) >= len(_PROSPECTS)

    def _started(self) -> "subprocess.Popen[bytes]":
        # A command that only this process hands signals past keeps them blocked.
        unblock = partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, STOP_SIGNALS) if self._ranks.by_command else None
        try:
            return subprocess.Popen(
                self.command,
                env=self._environment,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT if self._output else None,
                preexec_fn=unblock,
            )
        except OSError as error:
            raise UserError(f"{self.command[0]}: cannot start ({error.strerror})") from None


def _kill(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        for child in processes.below(process.pid, recursive=True):
            send(child.pid, signal.SIGKILL)
        process.kill()


def send(pid: int, number: signal.Signals) -> None:
    """Give a process a signal, if it has not ended meanwhile."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


@contextmanager
def stop_signals_wait() -> Iterator[None]:
    """Requests to stop that come in the block wait for `wait_for_signal`, or for its end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def wait_for_signal(seconds: float) -> signal.Signals | None:
    """A request to stop that this process gets within so many seconds; they must be blocked."""
    received = signal.sigtimedwait(STOP_SIGNALS, seconds)
    return None if received is None else signal.Signals(received.si_signo)


def say(text: str) -> None:
    """Write a line to standard error."""
    print(f"supervise: {text}", file=sys.stderr, flush=True)
