"""A run as its folder tells it: what it read can be computed again, whatever has become of it."""

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.ordering import Order
from data_pipeline.quarantine import QuarantineRecord
from data_pipeline.rows import read_row_plan, row_format_of
from data_pipeline.run_order import SPLIT, run_order, start_hash
from data_pipeline.shards import Manifest
from tidal_dist.config import Config, load_config
from tidal_dist.errors import ConfigError, ShardError
from tidal_dist.history.log import read_log

CONFIG = "config.yaml"


@dataclass(frozen=True)
class PastRun:
    """A run's folder, its configuration, the shards that it reads, what it leaves out of them, and their order.

    `start`: its first rolling hash.
    """

    folder: Path
    config: Config
    manifest: Manifest
    record: QuarantineRecord
    order: Order
    start: str

    @property
    def rows_per_step(self) -> int:
        """Rows of one step over all ranks."""
        return self.config.training.batch_rows


def open_run(folder: Path, shards: Path | None = None) -> PastRun:
    """Open a run's folder.

    Args:
        shards: where its shards are now, if they have moved.

    Raises:
        ConfigError: it is no run. ShardError: its shards are not there, or not those that it read.
    """
    config = run_config(folder)
    data = config.data if shards is None else config.data.model_copy(update={"shards": str(shards)})
    manifest = Manifest.of(data)
    shard_rows = [plan["rows"] for plan in read_row_plan(manifest, row_format_of(data))[SPLIT]]
    start = start_hash(manifest, shard_rows, data)
    log = read_log(folder)
    if log and log[0].step == 0 and log[0].rolling_hash != start:
        raise ShardError(
            f"{manifest.where}: not the shards that {folder} read, or planned in other rows; "
            "restore those, or give where they are with --data"
        )
    record = QuarantineRecord.load(folder, manifest.hash)
    order = run_order(manifest, shard_rows, data, config.training.batch_rows, record)
    order.check()
    return PastRun(folder, config, manifest, record, order, start)


def run_config(folder: Path) -> Config:
    """The configuration of a run.

    Raises:
        ConfigError: it has none, or one that this program does not know.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder}: no {CONFIG}, so no run; give the run_dir of a training")
    return load_config(folder / CONFIG)
