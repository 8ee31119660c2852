"""The heartbeats of a run as they look from here, whatever the clocks of its hosts say.

Times inside a heartbeat are of one host and are compared with each other alone. How old a heartbeat is comes from its
file's time; where that makes a rank look silent, a second look tells: what has changed meanwhile beats.
"""

import json
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from tidal_dist import processes
from tidal_dist.training.heartbeat import HEARTBEATS, Beat

State = Literal["beating", "silent", "gone", "halted", "ended"]
_SILENT_INTERVALS = 3.0
_FIELDS = {f.name for f in fields(Beat)}


@dataclass(frozen=True)
class Heart:
    """A rank's heartbeat and what it means.

    Attributes:
        state: beating: its thread runs. silent: no heartbeat for some intervals. gone: its process, on this host, has
            ended without saying so. halted: its process was stopped by a signal (SIGSTOP). ended: it said so.
        age: seconds since the heartbeat was written, by the clock of the file system. skew: of its host's clock
            against that one, in seconds.
    """

    beat: Beat
    state: State
    age: float
    skew: float

    @property
    def idle(self) -> float:
        """Seconds since the rank last made progress."""
        return max(0.0, self.beat.written - self.beat.active) + (0.0 if self.state == "beating" else self.age)

    @property
    def in_phase(self) -> float:
        """Seconds since its phase began."""
        return max(0.0, self.beat.written - self.beat.since) + (0.0 if self.state == "beating" else self.age)


def read_hearts(run: Path, pause: Callable[[float], None] | None = None) -> list[Heart]:
    """The hearts of a run by rank; [] where there are none.

    Args:
        pause: waits some seconds, for a second look where ranks look silent; none: no second look.
    """
    first = _look(run)
    if not pause or not any(h.state == "silent" for h in first):
        return first
    pause(max(1.5 * h.beat.interval for h in first if h.state == "silent"))
    before = {h.beat.rank: h.beat.written for h in first}
    return [
        Heart(h.beat, "beating", h.age, h.skew)
        if h.state == "silent" and before.get(h.beat.rank, h.beat.written) != h.beat.written
        else h
        for h in _look(run)
    ]


def _look(run: Path) -> list[Heart]:
    found = []
    for path in sorted((run / HEARTBEATS).glob("rank-*.json")):
        try:
            content, changed = json.loads(path.read_bytes()), path.stat().st_mtime
            found.append((Beat(**{k: v for k, v in content.items() if k in _FIELDS}), changed))
        except (OSError, ValueError, TypeError, AttributeError):
            continue  # of another version, or just replaced: it counts as missing
    # A heartbeat is stamped just before it is written, so what all of a host's have in common is its clock's error.
    skews = {host: min(c - b.written for b, c in found if b.host == host) for host in {b.host for b, _ in found}}
    # Where this host's clock is behind, the newest heartbeat tells the time.
    now = max([time.time(), *(c for _, c in found)])
    return [_heart(beat, now - changed, -skews[beat.host]) for beat, changed in found]


def _heart(beat: Beat, age: float, skew: float) -> Heart:
    return Heart(beat, _state(beat, age), age, skew)


def _state(beat: Beat, age: float) -> State:
    if beat.ended:
        return "ended"
    if beat.host == socket.gethostname():
        state = processes.state(beat.pid)
        if state != "living":
            return state or "gone"
    return "silent" if age > _SILENT_INTERVALS * beat.interval else "beating"


@dataclass(frozen=True)
class Slowness:
    """How much slower a rank works than the others.

    Attributes:
        ratio: its own work a step to the median of the others'. phase: where most of the difference is. excess: that
            difference, in seconds a step.
    """

    rank: int
    ratio: float
    phase: str
    excess: float


_LEAST_STEPS = 8


def slowness(hearts: list[Heart]) -> dict[int, Slowness]:
    """Of every rank that has made enough steps, by rank; {} for a single one."""
    beats = [h.beat for h in hearts if h.beat.steps_measured >= _LEAST_STEPS and h.beat.working > 0]
    found = {}
    for beat in beats if len(beats) > 1 else []:
        others = [b for b in beats if b.rank != beat.rank]
        more = {
            phase: seconds - statistics.median(b.seconds.get(phase, 0.0) for b in others)
            for phase, seconds in beat.seconds.items()
            if phase != "agree"
        }
        phase = max(more, key=more.__getitem__)
        ratio = beat.working / statistics.median(b.working for b in others)
        found[beat.rank] = Slowness(beat.rank, ratio, phase, more[phase])
    return found
