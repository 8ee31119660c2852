"""A run folder belongs to one job at a time."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from data_pipeline.preparing.locks import exclusive
from tidal_dist.diagnose.hearts import Heart, read_hearts
from tidal_dist.errors import UserError
from tidal_dist.processes import LAUNCH_ID

RUN_LOCK = "run.lock"
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
# Loader processes of a killed job share its lock until they notice that it is gone.
_PATIENCE_SECONDS = 10.0
_OLD_SECONDS = 600.0


@contextmanager
def held(run: Path, pause: Callable[[float], None] = time.sleep) -> Iterator[None]:
    """Hold a run's folder for this job; the lock ends with the process, however it ends.

    Where the file system has no locks, or those of one machine only, the heartbeats tell: one that goes on beating is
    of another job.

    Raises:
        UserError: another job is at it.
    """
    is_new = not run.exists()
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(run / RUN_LOCK, str(run), _PATIENCE_SECONDS))
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(f"{run / RUN_LOCK}: cannot write ({error.strerror}); choose another run_dir") from None
        if heart := _other_job(run, pause):
            raise UserError(
                f"{run}: process {heart.beat.pid} on {heart.beat.host} is at it since {heart.beat.started_text}; "
                "wait until it has ended, or stop it"
            )
        try:
            yield
        except UserError:
            if is_new:  # a mistake leaves nothing behind
                with suppress(OSError):
                    os.unlink(run / RUN_LOCK)
                    run.rmdir()
            raise


def _other_job(run: Path, pause: Callable[[float], None]) -> Heart | None:
    """A rank of another job that trains in this folder.

    A rank of this launch's earlier start is none: it was killed, or is cut off and cannot make a step.
    """
    launch = os.environ.get(LAUNCH_ID)
    others = [h for h in read_hearts(run) if h.beat.pid != os.getpid() and (not launch or h.beat.launch != launch)]
    suspects = [h for h in others if h.state in ("beating", "silent")]
    # Clocks may differ, but not by so much.
    if not any(h.age < _OLD_SECONDS for h in suspects):
        return None
    pause(2.5 * max(h.beat.interval for h in suspects))
    before = {h.beat.rank: h.beat.written for h in suspects}
    return next((h for h in read_hearts(run) if before.get(h.beat.rank, h.beat.written) != h.beat.written), None)
