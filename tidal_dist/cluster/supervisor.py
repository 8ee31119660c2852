"""Sees that a run goes on: starts it again after a crash from its newest checkpoint, and stops on request."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from data_pipeline.errors import UserError
from tidal_dist.cluster.attempt import Attempt, say, wait_for_signal
from tidal_dist.config import Config
from tidal_dist.history.events import read_events
from tidal_dist.training.commit import complete_checkpoints, step_of

USER_ERROR = 2
UNFINISHED = 3
_SHARED_FOLDER_SECONDS = 10.0
_TICK_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 300.0


def supervise(config: Config, start: Callable[[bool], Attempt], max_restarts: int, pause: float) -> int:
    """Start until the run is finished or was stopped on request (0), or there is no point in going on.

    Signals that ask to stop must be blocked.

    Args:
        start: makes the next attempt; its argument: whether to resume.
        max_restarts: without a new checkpoint. pause: seconds before the first of them; doubles with each.

    Raises:
        UserError: of the first `start`, or a command that cannot be started.
    """
    restarts, is_first = 0, True
    while True:
        begun, step = time.time(), newest_step(config)
        if is_finished(config):
            say(f"{config.run_dir} is finished")
            return 0
        try:
            attempt = start(bool(step))
            code = attempt.run()
        except UserError as error:
            if is_first:
                raise
            say(f"cannot start: {error}")
            code = 1
        else:
            if attempt.requested or code == USER_ERROR:
                return code
            if code == 0 and (is_finished(config) or _has_stopped(config, begun)):
                return 0
        is_first = False
        restarts = 0 if (newest_step(config) or 0) > (step or 0) else restarts + 1
        if restarts > max_restarts:
            say(f"ended with code {code} after {max_restarts} restarts without a new checkpoint; giving up")
            return code or 1
        seconds = min(pause * 2 ** max(restarts - 1, 0), _LONGEST_PAUSE_SECONDS)
        say(f"ended with code {code}; starting again in {seconds:g} s ({restarts} without a new checkpoint)")
        if received := wait_for_signal(seconds):
            say(f"{received.name}: not starting again")
            return 0


def run_once(config: Config, start: Callable[[bool], Attempt]) -> int:
    """Start once, perhaps on one of many nodes; 0 only if the run is finished, 3 where it was stopped before its end.

    Raises:
        UserError: of `start`, or a command that cannot be started.
    """
    begun = time.time()
    if is_finished(config):
        say(f"{config.run_dir} is finished")
        return 0
    if code := start(bool(newest_step(config))).run():
        return code
    # What the first rank writes at the end comes to other nodes a little later.
    deadline = time.monotonic() + _SHARED_FOLDER_SECONDS
    while not (is_finished(config) or _has_stopped(config, begun)) and time.monotonic() < deadline:
        time.sleep(_TICK_SECONDS)
    return 0 if is_finished(config) else UNFINISHED


def newest_step(config: Config) -> int | None:
    """The step of the newest complete checkpoint, if there is one."""
    found = complete_checkpoints(Path(config.run_dir) / "checkpoints")
    return step_of(found[-1]) if found else None


def is_finished(config: Config) -> bool:
    """Whether the run has made all its steps and said so, or has ended early by its own rule."""
    last = _last_event(config)
    if last is None:
        return (newest_step(config) or 0) >= config.training.steps
    return last["event"] == "finish" and (last["step"] >= config.training.steps or bool(last.get("reason")))


def _has_stopped(config: Config, since: float) -> bool:
    """Whether the run was stopped on request: by a signal to one of its ranks, or by its time limit.

    The launcher's exit code alone does not tell: it is 0 also where the launcher itself was killed.
    """
    last, events = _last_event(config), Path(config.run_dir) / "events.jsonl"
    return last is not None and last["event"] == "stop" and os.stat(events).st_mtime >= since - 1


def _last_event(config: Config) -> dict | None:
    """The last one that tells whether the run goes on."""
    events = [e for e in read_events(Path(config.run_dir)) if e["event"] in ("start", "resume", "stop", "finish")]
    return events[-1] if events else None
