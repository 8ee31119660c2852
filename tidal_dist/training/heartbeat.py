"""RUN/heartbeats/rank-NNNNN.json: what each rank is doing, written by a thread that beats on when the rank is stuck.

A main thread that hangs shows as a phase that lasts while heartbeats go on, a process that has ended or is stopped as
heartbeats that do not come. Nothing here may ever disturb training: what cannot be written is not written.
"""

import json
import os
import socket
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tidal_dist.processes import LAUNCH_ID
from tidal_dist.training.phases import Phase

HEARTBEATS = "heartbeats"
_INTERVAL_SECONDS = 5.0
_SHORTEST_SECONDS = 1.0
_START_SECONDS = 20.0
_STUCK_SECONDS = 10.0
_STACK_FRAMES = 16
_WARM_STEPS = 2  # are slow on every machine
_REMEMBERED_STEPS = 64
_OUTSIDE_STEPS = ("validation", "checkpoint")


@dataclass
class Beat:
    """What a rank said of itself last. Times are wall times of its host.

    Attributes:
        since: when the phase began. active: when the rank last met the others, entered a phase or made a step.
        seconds: means of the last steps, by phase; "agree" is time spent in exchanges that wait for the slowest rank,
            "other" what belongs to no phase.
        stack: the innermost calls of the main thread, outermost first, where a phase lasts long; else empty.
        collective: the last one that the rank took part in, where a phase lasts long and the library tells.
        stopping: why it wants to stop. ended: "finished", "stopped" or what went wrong; none: it has not ended.
        launch: the launch on several hosts that it belongs to.
    """

    rank: int
    world: int
    local_rank: int
    host: str
    pid: int
    started: float
    step: int = 0
    phase: str = "start"
    since: float = 0.0
    active: float = 0.0
    written: float = 0.0
    interval: float = _INTERVAL_SECONDS
    steps_measured: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    stack: list[str] = field(default_factory=list)
    collective: str | None = None
    stopping: str | None = None
    ended: str | None = None
    launch: str | None = None

    @property
    def seconds_per_step(self) -> float:
        """Mean wall time of a step, without validation and checkpoints; 0.0 before the first."""
        return sum(self.seconds.values())

    @property
    def working(self) -> float:
        """Mean seconds of a step in which the rank did not wait for others in an exchange.

        All ranks take equally long for a step, and the slow one waits least: it is the one that the others wait for.
        Under ZeRO-3 forward and backward hold exchanges too, so that a slow device shows only in part; slow data
        shows fully.
        """
        return self.seconds_per_step - self.seconds.get("agree", 0.0)

    @property
    def started_text(self) -> str:
        """When the rank started, for people."""
        return datetime.fromtimestamp(self.started, UTC).strftime("%Y-%m-%d %H:%M UTC")


def heartbeat_file(run: Path, rank: int) -> Path:
    """Where a rank's heartbeat is."""
    return run / HEARTBEATS / f"rank-{rank:05d}.json"


def mark_ended(run: Path, rank: int, how: str) -> None:
    """Say of a rank that is known to have ended, and could not say so itself, how; as in `Beat.ended`."""
    path = heartbeat_file(run, rank)
    with suppress(OSError, ValueError, TypeError):
        _write(path, json.loads(path.read_bytes()) | {"ended": how})


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)


class Heartbeat:
    """The heartbeat of this rank.

    Args:
        stopping: why the rank wants to stop, if it does. last_collective: what `Beat.collective` shows.
        patience_seconds: after so long in one phase a line goes to standard error, once, from each host.
    """

    def __init__(
        self,
        run: Path,
        stopping: Callable[[], str | None] = lambda: None,
        last_collective: Callable[[], str | None] = lambda: None,
        patience_seconds: float = 900.0,
        interval_seconds: float = _INTERVAL_SECONDS,
    ):
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        now, host = time.time(), socket.gethostname()
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._run, self._path = run, heartbeat_file(run, rank)
        self._beat = Beat(rank, world, local_rank, host, os.getpid(), now, since=now, active=now)
        self._beat.interval, self._beat.launch = interval_seconds, os.environ.get(LAUNCH_ID)
        self._stopping, self._last_collective, self._patience = stopping, last_collective, patience_seconds
        self._begun, self._wake, self._main = threading.Event(), threading.Event(), threading.get_ident()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._steps: deque[dict[str, float]] = deque(maxlen=_REMEMBERED_STEPS)
        self._phase, self._entered = "start", time.monotonic()
        self._made = 0
        self._is_stepping = self._has_removed = self._has_warned = self._is_over = False
        self._thread = threading.Thread(target=self._go_on, name="heartbeat", daemon=True)

    def begin(self) -> None:
        """The run's folder is this job's: write from the first step on, or when the start takes long."""
        self._thread.start()

    def enter(self, phase: Phase) -> None:
        """A phase begins; what is outside of all phases counts as the end of the one before."""
        now = time.monotonic()
        beat, wall = self._beat, time.time()
        self._seconds[self._phase if self._phase != "start" else "other"] += now - self._entered
        self._phase, self._entered = phase, now
        if phase == "start" and self._is_stepping:
            return
        beat.phase, beat.since, beat.active = phase, wall, wall
        if wall - beat.written > _SHORTEST_SECONDS:
            self._wake.set()

    def step(self, step: int) -> None:
        """The run is after step `step`."""
        self._made += self._is_stepping
        if self._made > _WARM_STEPS:
            self._steps.append({p: s for p, s in self._seconds.items() if p not in _OUTSIDE_STEPS})
        self._seconds.clear()
        self._beat.step, self._is_stepping = step, True
        self._begun.set()

    def touch(self) -> None:
        """All ranks have met: whatever the phase, it goes on."""
        self._beat.active = time.time()

    def end(self, how: str, is_mistake: bool = False) -> None:
        """Write the last heartbeat; after a mistake only if there were others. how: as in `Beat.ended`."""
        if self._thread.ident is None or (is_mistake and not self._beat.written):
            return
        self._beat.ended, self._is_over = how, True
        self._begun.set()
        self._wake.set()
        self._thread.join(timeout=5.0)  # the folder may hang

    def place(self, phase: Phase | None = None) -> str:
        """Where the rank stands, or stood in `phase`, for people."""
        beat = self._beat
        return f"rank {beat.rank} on {beat.host}, {phase or beat.phase} of step {beat.step + 1}"

    def _go_on(self) -> None:
        self._begun.wait(_START_SECONDS)
        while not self._is_over:
            with suppress(Exception):
                self._write()
            self._wake.wait(self._beat.interval)
            self._wake.clear()
            if not self._is_over:
                time.sleep(max(0.0, min(_SHORTEST_SECONDS, self._beat.written + _SHORTEST_SECONDS - time.time())))
        with suppress(Exception):
            self._write()

    def _remove_old(self) -> None:
        """What an earlier job left: ranks that this one has not, and records of its collectives."""
        self._has_removed = True
        for path in self._path.parent.iterdir():
            kind, _, rank = path.stem.partition("-")
            is_of_no_rank = kind == "rank" and rank.isdigit() and int(rank) >= self._beat.world
            # A record of this job may be there before its first heartbeat.
            if is_of_no_rank or (kind == "flight" and path.stat().st_mtime < self._beat.started):
                path.unlink(missing_ok=True)

    def _write(self) -> None:
        beat, now = self._beat, time.time()
        if self._is_stepping and not self._has_removed and beat.rank == 0 and beat.written:
            self._remove_old()
        lasts = now - beat.active
        steps = list(self._steps)
        beat.steps_measured = len(steps)
        phases = {phase for step in steps for phase in step}
        beat.seconds = {p: round(sum(s.get(p, 0.0) for s in steps) / len(steps), 6) for p in sorted(phases)}
        is_stuck = lasts > _STUCK_SECONDS and not beat.ended
        beat.stack = self._stack() if is_stuck else []
        beat.collective = self._last_collective() if is_stuck else None
        beat.stopping = self._stopping()
        beat.written = now
        self._path.parent.mkdir(exist_ok=True)
        _write(self._path, asdict(beat))
        if is_stuck and lasts > self._patience and not self._has_warned and beat.local_rank == 0:
            self._has_warned = True
            text = f"{self.place()} has lasted {lasts / 60:.0f} min; `tidal diagnose {self._run}` says who is missing"
            print(text, file=sys.stderr, flush=True)

    def _stack(self) -> list[str]:
        frame: Any = sys._current_frames().get(self._main)
        calls: list[str] = []
        while frame is not None and len(calls) < _STACK_FRAMES:
            code = frame.f_code
            calls.append(f"{'/'.join(Path(code.co_filename).parts[-3:])}:{frame.f_lineno} {code.co_name}")
            frame = frame.f_back
        return calls[::-1]
