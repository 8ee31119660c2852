"""What is told of checkpoints: a line to read now, a line in the run's events, scalars."""

from tidal_dist.training.commit import Skipped
from tidal_dist.training.run import Run


def tell_start(run: Run, step: int, skipped: list[Skipped]) -> None:
    """Where a run begins, or which checkpoint it goes on from and which it could not."""
    for skip in skipped:
        run.monitor.line(f"{skip.checkpoint} skipped: {skip.reason}")
        run.events.add("skip_checkpoint", step, checkpoint=skip.checkpoint, reason=skip.reason)
    loaded = run.saver.loaded
    if not loaded:
        run.events.add("start", step, ranks=run.world)
        return
    run.events.add("resume", step, **loaded)
    converted = f", converted from {loaded['saved_by_ranks']} ranks' layout" if loaded["converted"] else ""
    run.monitor.line(
        f"{loaded['checkpoint']}{converted}: weights and moments are what was saved, "
        f"probe loss differs by {loaded['probe_loss_difference']:.1g}"
    )


def tell_saves(run: Run) -> None:
    """How the saves went that have ended."""
    for outcome in run.saver.finished():
        run.watch.interrupts.saw_save(outcome.stall_seconds + outcome.seconds)
        scalars = {"checkpoint/failed": float(not outcome.is_committed)}
        if outcome.error:
            run.monitor.line(f"step {outcome.step}: saving failed, older checkpoints are as they were: {outcome.error}")
            run.events.add("save_failed", outcome.step, reason=outcome.error)
        if outcome.is_committed:
            seconds = {"seconds": round(outcome.seconds, 3), "stall_seconds": round(outcome.stall_seconds, 3)}
            scalars |= {f"checkpoint/{name}": value for name, value in seconds.items()}
            scalars["checkpoint/bytes"] = float(outcome.bytes)
            run.events.add("save", outcome.step, **seconds, bytes=outcome.bytes)
        run.monitor.scalars(outcome.step, scalars)
