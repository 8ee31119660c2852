"""What a rank is doing, and for how long: loading, passing forward, waiting for others, saving."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Phase = Literal["start", "data", "agree", "forward", "backward", "optimizer", "validation", "checkpoint", "end"]


class Phases:
    """The phase that this rank is in, and the seconds spent in each.

    Args:
        synchronize: waits until the device has done what it was asked for; called around the phases of steps that are
            `measured`, since a GPU works behind the calls.
        on_change: told of every phase that begins.

    Attributes:
        failed_in: the innermost phase that an error has left.
    """

    def __init__(self, synchronize: Callable[[], None], on_change: Callable[[Phase], None] | None = None):
        self._synchronize, self._on_change = synchronize, on_change
        self._current: Phase = "start"
        self._since = time.monotonic()
        self._seconds: defaultdict[Phase, float] = defaultdict(float)
        self._measured: defaultdict[Phase, float] = defaultdict(float)
        self.measured = False
        self.failed_in: Phase | None = None

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        """Around what belongs to a phase; inside another one its time counts for this one alone."""
        outer = self._current
        self._enter(phase)
        try:
            yield
        except Exception:
            self.failed_in = self.failed_in or phase
            raise
        finally:
            self._enter(outer)

    def _enter(self, phase: Phase) -> None:
        if self.measured:
            self._synchronize()
        now = time.monotonic()
        self._seconds[self._current] += now - self._since
        if self.measured:
            self._measured[self._current] += now - self._since
        self._current, self._since = phase, now
        if self._on_change:
            self._on_change(phase)

    def take(self) -> dict[Phase, float]:
        """Seconds of every phase since the last call."""
        self._enter(self._current)
        taken, measured = dict(self._seconds), self._measured
        self._seconds, self._measured = defaultdict(float), defaultdict(float)
        # On a GPU the forward pass returns before it is done, and the backward pass waits for both: steps that are
        # measured tell them apart.
        if (passes := measured["forward"] + measured["backward"]) > 0:
            both = taken["forward"] + taken["backward"]
            taken["forward"] = both * measured["forward"] / passes
            taken["backward"] = both - taken["forward"]
        return taken
