"""How a run ends before its time, on request, and takes up again what that cut off."""

import sys
from pathlib import Path

from data_pipeline.stream import Step, Stream
from tidal_dist.errors import UserError
from tidal_dist.history.events import Events
from tidal_dist.training import engine as ds
from tidal_dist.training.commit import complete_checkpoints, step_of
from tidal_dist.training.interrupts import Interrupts, WaitBroken
from tidal_dist.training.run import Run
from tidal_dist.training.state import RunState
from tidal_dist.training.telling import tell_saves
from tidal_dist.training.watch import Watch


def owes_validation(run: Run, state: RunState) -> bool:
    """Whether the checkpoint that is resumed from was written when its validation had been cut off."""
    is_due = state.step == run.config.training.steps or state.step % run.config.validation.every_steps == 0
    return bool(state.step and is_due and not state.metrics and run.data.pictured)


def stop(run: Run, state: RunState) -> None:
    """Save and say how to go on."""
    rank, reason = _who_stops(run.watch)
    with run.watch.phases("checkpoint"):
        run.saver.save_last(state)
    tell_saves(run)
    run.events.add("stop", state.step, reason=reason, rank=rank)
    how = "saved; go on with --resume" if state.step else "there is nothing to save; start again without --resume"
    where = f"step {state.step} of {run.config.training.steps}"
    run.monitor.line(f"stopped at {where} ({reason}, rank {rank}): {how}")
    run.watch.stopped = True


def stop_at_start(watch: Watch, folder: Path, rank: int) -> None:
    """Say that the run was stopped before it began; nothing has changed."""
    by, reason = _who_stops(watch)
    if rank == 0:
        found = complete_checkpoints(folder / "checkpoints")
        step = step_of(found[-1]) if found else 0
        Events(folder, writes=True).add("stop", step, reason=reason, rank=by)
        print(f"stopped before the first step ({reason}, rank {by})", file=sys.stderr, flush=True)
    watch.stopped = True


def _who_stops(watch: Watch) -> tuple[int, str]:
    """The first rank that wants to stop, and why."""
    reasons = ds.gather_objects(watch.interrupts.reason)
    return next((rank, reason) for rank, reason in enumerate(reasons) if reason)


def next_step(stream: Stream, interrupts: Interrupts) -> Step | UserError | None:
    """The next step, or why this rank cannot read it; none: the wait was broken off, since the rank wants to stop."""
    try:
        with interrupts.breakable():
            return next(stream)
    except UserError as error:
        return error
    except WaitBroken:
        return None
