"""What watches over the run of this rank: its phases and heartbeat, and what asks it to stop."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tidal_dist.config import Config
from tidal_dist.errors import UserError
from tidal_dist.training.heartbeat import Heartbeat
from tidal_dist.training.interrupts import Interrupts, LostRanks, Meeting
from tidal_dist.training.phases import Phases
from tidal_dist.training.startup import Startup


class Watch:
    """Around a run: the last heartbeat says how it ended, and an error about lost ranks says where that was.

    Args:
        synchronize: as `Phases` takes it. exchange: as `Meeting` takes it. last_collective: as `Heartbeat` takes it.

    Attributes:
        stopped: the run has ended on request. startup: where the seconds before the first step went.
    """

    def __init__(
        self,
        config: Config,
        interrupts: Interrupts,
        synchronize: Callable[[], None],
        exchange: Callable[..., dict[str, bool]],
        last_collective: Callable[[], str | None],
    ):
        self.startup = Startup()
        self._run, self.interrupts, self.stopped = Path(config.run_dir), interrupts, False
        half_the_timeout = 30 * config.training.collective_timeout_minutes
        self.heartbeat = Heartbeat(self._run, lambda: interrupts.reason, last_collective, half_the_timeout)
        self.phases = Phases(synchronize, self.heartbeat.enter)
        self.meeting = Meeting(interrupts, exchange, self.heartbeat.touch)
        interrupts.limit_time(config.training.time_limit_minutes)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.heartbeat.end("stopped" if self.stopped else "finished")
        elif isinstance(error, LostRanks):
            self.heartbeat.end(f"lost ranks: {error}")
            where = self.heartbeat.place(self.phases.failed_in)
            raise LostRanks(f"{where}: lost contact ({error}); `tidal diagnose {self._run}` says with whom") from error
        elif isinstance(error, UserError):
            self.heartbeat.end(f"error: {error}", is_mistake=True)
        else:
            self.heartbeat.end(f"{type(error).__name__}: {error}")
