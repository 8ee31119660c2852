"""What the parts of a run work with on one rank."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipeline.tokenizer import MixedTokenizer
from tidal_dist.config import Config
from tidal_dist.history.events import Events
from tidal_dist.training.data import RunData
from tidal_dist.training.monitor import Monitor
from tidal_dist.training.state import Saver
from tidal_dist.training.validation import attention_share
from tidal_dist.training.watch import Watch


@dataclass(frozen=True)
class Run:
    """A run as it is open on rank `rank` of `world`."""

    config: Config
    tokenizer: MixedTokenizer
    data: RunData
    engine: Any
    saver: Saver
    monitor: Monitor
    events: Events
    watch: Watch
    rank: int
    world: int

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.run_dir)

    @property
    def rows_per_step(self) -> int:
        """Rows of one step over all ranks."""
        return self.config.training.batch_rows

    @cached_property
    def attention_share(self) -> dict[str, float]:
        """What attention computes of a held-out batch; the same at every validation, since the rows are."""
        return attention_share(self.engine.module, self.data.validation)
