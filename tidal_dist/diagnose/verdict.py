"""What has become of a run, and which ranks it waits for."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tidal_dist.diagnose.flights import last_collective
from tidal_dist.diagnose.hearts import Heart, Slowness, read_hearts, slowness
from tidal_dist.errors import UserError
from tidal_dist.history.events import read_events

Status = Literal["running", "finished", "stopped", "failed", "dead", "hung"]
DEFAULT_PATIENCE_SECONDS = 60.0
DEFAULT_SLOWER = 1.3
_ORDER = ("start", "data", "agree", "forward", "backward", "optimizer", "validation", "checkpoint", "end")
_LONG_PHASES = ("start", "validation", "checkpoint")
_CLOCKS_DIFFER_SECONDS = 5.0


@dataclass(frozen=True)
class Verdict:
    """What has become of a run.

    Attributes:
        culprits: ranks that the others wait for, or that have failed. missing: ranks without a heartbeat.
        lines: what is wrong or worth knowing, for people. slow: ranks that are slower than the rest.
    """

    status: Status
    culprits: list[int]
    missing: list[int]
    lines: list[str]
    hearts: list[Heart]
    speeds: dict[int, Slowness] = field(default_factory=dict)
    slow: list[int] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        """Whether nothing needs to be done."""
        return self.status in ("running", "finished", "stopped") and not (self.culprits or self.missing or self.slow)


def diagnose(
    run: Path,
    patience: float = DEFAULT_PATIENCE_SECONDS,
    slower: float = DEFAULT_SLOWER,
    pause: Callable[[float], None] = time.sleep,
) -> Verdict:
    """Judge a run by its heartbeats and events, while it runs or afterwards.

    Args:
        patience: seconds without progress after which a run hangs; longer where its steps are.
        slower: how many times the others' work a step takes where a rank counts as slow.

    Raises:
        UserError: there is nothing to judge by.
    """
    hearts = read_hearts(run, pause)
    if not hearts:
        return _by_events(run)
    world = max(h.beat.world for h in hearts)
    missing = sorted(set(range(world)) - {h.beat.rank for h in hearts})
    status, culprits = _judge(hearts, patience)
    lines = [f"rank {r} has never given a heartbeat" for r in missing]
    lines += [_describe(run, h) for h in hearts if h.beat.rank in culprits]
    if status == "hung":
        lines += _who_waits(run, [h for h in hearts if h.beat.rank not in culprits and h.state == "beating"])
    speeds = slowness(hearts)
    slow = [r for r, s in speeds.items() if status == "running" and s.ratio >= slower]
    lines += [_describe_slow(next(h for h in hearts if h.beat.rank == r), speeds[r]) for r in slow]
    return Verdict(status, culprits, missing, [*lines, *_clocks(hearts)], hearts, speeds, slow)


def _by_events(run: Path) -> Verdict:
    last = next((e for e in reversed(read_events(run)) if e["event"] in ("finish", "stop")), None)
    if last is None:
        raise UserError(f"{run}: no heartbeats and no events: not the folder of a run, or one that has not begun")
    status: Status = "finished" if last["event"] == "finish" else "stopped"
    return Verdict(status, [], [], [f"by its events alone: {last['event']} at step {last['step']}"], [])


def _judge(hearts: list[Heart], patience: float) -> tuple[Status, list[int]]:
    """The status, and the ranks that are to blame."""
    lost = [h for h in hearts if h.state in ("silent", "gone", "halted")]
    living = [h for h in hearts if h.state == "beating"]
    failed = [h for h in hearts if h.beat.ended not in (None, "finished", "stopped")]
    if not living:
        if lost and all(h.state == "halted" for h in lost):
            return "hung", _ranks(lost)
        if lost:
            return "dead", _ranks(_first_failed(lost + failed))
        if failed:
            return "failed", _ranks(_first_failed(failed))
        return ("finished" if all(h.beat.ended == "finished" for h in hearts) else "stopped"), []
    if lost or failed:
        return "hung", _ranks(lost + failed)
    if min(h.idle / _patience(h, patience) for h in living) > 1:
        behind = min(_progress(h) for h in living)
        culprits = [h for h in living if _progress(h) == behind]
        return "hung", _ranks(culprits) if len(culprits) < len(living) else []
    return "running", []


def _first_failed(hearts: list[Heart]) -> list[Heart]:
    """Those that ended for a reason of their own: a lost contact is the consequence of another's end."""
    return [h for h in hearts if not (h.beat.ended or "").startswith("lost ranks")] or hearts


def _patience(heart: Heart, patience: float) -> float:
    longest = max(patience, 10 * heart.beat.seconds_per_step)
    return 5 * longest if heart.beat.phase in _LONG_PHASES else longest


def _progress(heart: Heart) -> tuple[int, int]:
    return heart.beat.step, _ORDER.index(heart.beat.phase) if heart.beat.phase in _ORDER else 0


def _ranks(hearts: list[Heart]) -> list[int]:
    return sorted(h.beat.rank for h in hearts)


def _describe(run: Path, heart: Heart) -> str:
    beat = heart.beat
    what = {
        "beating": f"stands still for {span(heart.idle)}",
        "silent": f"has given no heartbeat for {span(heart.age)}: its process or its host is gone, or stopped",
        "gone": f"has ended without a word, {span(heart.age)} ago or less",
        "halted": f"was stopped by a signal (SIGSTOP), {span(heart.age)} ago; SIGCONT lets it go on",
        "ended": f"ended: {beat.ended}",
    }[heart.state]
    where = f"in {beat.phase} of step {beat.step + 1}"
    stack = f"; at {beat.stack[-1]}" if beat.stack else ""
    collective = beat.collective or last_collective(run, beat.rank)
    took = f"; its last collective: {collective}" if collective else ""
    return f"rank {beat.rank} on {beat.host} (process {beat.pid}) {what}; {where}{stack}{took}"


def _who_waits(run: Path, waiting: list[Heart]) -> list[str]:
    """Where the others stand, ranks of one place in one line."""
    places: dict[tuple[str, int], list[Heart]] = {}
    for heart in waiting:
        places.setdefault((heart.beat.phase, heart.beat.step), []).append(heart)
    lines = []
    for (phase, step), hearts in places.items():
        one = max(hearts, key=lambda h: h.idle)
        stack = f"; at {one.beat.stack[-1]}" if one.beat.stack else ""
        collective = one.beat.collective or last_collective(run, one.beat.rank)
        took = f"; last collective: {collective}" if collective else ""
        lines.append(f"{_named(_ranks(hearts))} in {phase} of step {step + 1} for {span(one.in_phase)}{stack}{took}")
    return lines


def _named(ranks: list[int], shown: int = 8) -> str:
    more = f" and {len(ranks) - shown} more" if len(ranks) > shown else ""
    names = ", ".join(map(str, ranks[:shown]))
    return f"ranks {names}{more} stand" if len(ranks) > 1 else f"rank {names} stands"


def _describe_slow(heart: Heart, slow: Slowness) -> str:
    beat = heart.beat
    return (
        f"rank {beat.rank} on {beat.host} is {slow.ratio:.2f} times as slow as the rest: {beat.working:.3f} s of its "
        f"own a step; {slow.excess:+.3f} s of it in {slow.phase}"
    )


def _clocks(hearts: list[Heart]) -> list[str]:
    skews = {h.beat.host: h.skew for h in hearts}
    return [
        f"the clock of {host} differs from the file system's by {skew:+.0f} s"
        for host, skew in sorted(skews.items())
        if abs(skew) > _CLOCKS_DIFFER_SECONDS
    ]


def span(seconds: float) -> str:
    """A time span for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
