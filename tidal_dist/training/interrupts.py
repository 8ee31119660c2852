"""Requests to stop, by a signal or a time limit, and how all ranks agree to follow one.

Signals are blocked in all threads but one, which waits for them: so nothing in the main thread is ever interrupted, and
a second signal ends the process even where the main thread is stuck in a collective.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tidal_dist import processes

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
JOB_STARTED = "TIDAL_JOB_STARTED"
SIBLING_GONE = "ended by the launcher, since another rank of this host is gone"
_WAKE = signal.SIGURG  # what nobody handles is ignored, so it harms no process that gets it by mistake
_ONE_REQUEST_SECONDS = 2.0
_TICK_SECONDS = 1.0
_SLURM_MARGIN_SECONDS = 60.0
_REMEMBERED_PAUSES = 128


class Stopped(Exception):
    """All ranks have agreed to stop; raised on all of them, at the same place."""


class WaitBroken(BaseException):
    """This rank waited for data when it was asked to stop. No `Exception`, so that no reader takes it for its own."""


class LostRanks(Exception):
    """A collective failed: another rank has ended, hangs or cannot be reached."""


class Interrupts:
    """What asks this rank to stop.

    A first signal or the end of the time sets `reason`. A second signal ends the process at once; it counts as one
    when it comes later than what may be the same request on another way (to the process group and from a parent).

    The deepspeed launcher sends SIGTERM to its ranks when it was asked to stop, and also when one of them has failed,
    so that the others wait in vain: then they end at once.
    """

    def __init__(self) -> None:
        self._reason: str | None = None
        self._requested_at = 0.0
        self._agreed = self._breakable = False
        self._ends: list[tuple[float, float, str]] = []  # wall time, seconds kept free before it, name
        self._longest_save = 0.0
        self._pauses: deque[float] = deque([0.0], maxlen=_REMEMBERED_PAUSES)
        self._asked_at: float | None = None
        self._started = float(os.environ.get(JOB_STARTED, time.time()))

    def listen(self) -> None:
        """Take signals from now on. To be called before threads start: only later ones leave the signals alone."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        signal.signal(_WAKE, self._break_in)
        threading.Thread(target=self._receive, name="interrupts", daemon=True).start()

    def limit_time(self, minutes: float | None, environment: Mapping[str, str] = os.environ) -> None:
        """End `minutes` after the job has started, or when Slurm's time is up, whichever comes first."""
        if minutes is not None:
            margin = min(_SLURM_MARGIN_SECONDS, 0.05 * 60 * minutes)
            self._ends.append((self._started + 60 * minutes, margin, f"time limit of {minutes:g} minutes"))
        if environment.get("SLURM_JOB_END_TIME", "").isdigit():
            self._ends.append((float(environment["SLURM_JOB_END_TIME"]), _SLURM_MARGIN_SECONDS, "end of the Slurm job"))

    @property
    def reason(self) -> str | None:
        """Why this rank should stop; none: go on. Once there is a reason, it stays."""
        if self._reason is None:
            # Between two questions nothing can be saved, and what is asked last must still be done.
            needed = 1.5 * self._longest_save + 2 * max(self._pauses)
            late = [name for end, margin, name in self._ends if time.time() > end - margin - needed]
            if late:
                self._request(late[0])
        return self._reason

    def asked(self) -> bool:
        """Whether this rank wants to stop; to be called wherever all ranks can, so that the pauses are known."""
        now = time.monotonic()
        if self._asked_at is not None:
            self._pauses.append(now - self._asked_at)
        self._asked_at = now
        return self.reason is not None

    def agreed(self) -> None:
        """All ranks know and are about to end: the launcher need not be heard any more."""
        self._agreed = True

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around the writing of a checkpoint: its time is kept free at the end."""
        started = time.monotonic()
        yield
        self.saw_save(time.monotonic() - started)
        self._asked_at = None

    def saw_save(self, seconds: float) -> None:
        """Learn how long a checkpoint takes until it is written."""
        self._longest_save = max(self._longest_save, seconds)

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """Around a wait that a request to stop may break off.

        Raises:
            WaitBroken: in the main thread, some time after the request.
        """
        self._breakable = True
        try:
            yield
        finally:
            self._breakable = False

    def _request(self, reason: str) -> None:
        self._requested_at, self._reason = time.monotonic(), reason

    def _receive(self) -> None:
        while True:
            received = signal.sigtimedwait(STOP_SIGNALS, _TICK_SECONDS)
            if received is not None:
                self.take(signal.Signals(received.si_signo), received.si_pid)
            elif self._breakable and self.reason is not None:
                signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)

    def _break_in(self, *_: object) -> None:
        # The wait may have ended meanwhile; where it goes on, the next tick comes here again.
        if self._breakable:
            raise WaitBroken

    def take(self, received: signal.Signals, sender: int) -> None:
        """Follow a signal that process `sender` sent."""
        if "LOCAL_SIZE" in os.environ and sender == os.getppid():
            if not self._agreed and len(processes.below(sender)) < int(os.environ["LOCAL_SIZE"]):
                _say(f"rank {os.environ.get('RANK', '0')}: {SIBLING_GONE}")
                _end(received)  # that rank, or the launcher, says why
            if self._reason is None:
                self._request(f"{received.name} from the launcher")
        elif self._reason is None:
            self._request(received.name)
            if os.environ.get("RANK", "0") == "0":
                _say(f"{received.name}: saving and stopping; once more ends at once, without saving")
        elif time.monotonic() - self._requested_at > _ONE_REQUEST_SECONDS:
            _say(f"rank {os.environ.get('RANK', '0')}: {received.name} again: ended at once")
            _end(received)


def _end(received: signal.Signals) -> None:
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(128 + received)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Meeting:
    """Where all ranks ask each other, at least once a step: flags are shared, and a wish to stop of any rank is heard.

    Args:
        exchange: which flags are set on any rank. on_meeting: told of every meeting that went well.
    """

    def __init__(
        self, interrupts: Interrupts, exchange: Callable[..., dict[str, bool]], on_meeting: Callable[[], None]
    ):
        self._interrupts, self._exchange, self._on_meeting = interrupts, exchange, on_meeting

    def agree(self, **flags: bool) -> dict[str, bool]:
        """Which flags are set on any rank, in one exchange.

        Raises:
            Stopped: on all ranks, if any wants to stop.
        """
        agreed = self._exchange(stop=self._interrupts.asked(), **flags)
        self._on_meeting()
        if agreed["stop"]:
            self._interrupts.agreed()
            raise Stopped
        return agreed

    def any_rank(self, flag: bool = False) -> bool:
        """Whether the flag is set on any rank.

        Raises:
            Stopped: on all ranks, if any wants to stop.
        """
        return self.agree(flag=flag)["flag"]
