"""The order of a run's rows, from its shards, its configuration and its quarantine record."""

import hashlib
from collections.abc import Sequence

from data_pipeline.mixing import stages_of
from data_pipeline.ordering import Order, first_hash
from data_pipeline.quarantine import QuarantineRecord
from data_pipeline.rows import row_format_of
from data_pipeline.shards import DataConfig, Manifest

SPLIT = "train"


def run_order(
    manifest: Manifest, shard_rows: Sequence[int], data: DataConfig, rows_per_step: int, record: QuarantineRecord
) -> Order:
    """The order of the training rows.

    Args:
        shard_rows: rows of every training shard, by the row plan. rows_per_step: `training.batch_rows`.

    Raises:
        ShardError: the record names a shard that is not there.
    """
    return Order(
        tuple(shard_rows),
        data.lanes,
        data.seed,
        tuple(manifest.sources(SPLIT)),
        stages_of(data.mix, rows_per_step),
        record.in_order(entry["name"] for entry in manifest.shards(SPLIT)),
        record.empty_rows(),
    )


def start_hash(manifest: Manifest, shard_rows: Sequence[int], data: DataConfig) -> str:
    """The rolling hash of a run that has consumed nothing."""
    return first_hash(manifest.hash, row_format_of(data).plan_name, shard_rows)


def order_hash(start: str, order: Order, rows_per_step: int, rows: int) -> str:
    """Hash of everything that the order of the first `rows` rows depends on, quarantines apart.

    A mix may change where the run has not come yet: stages from later on do not count.
    """
    stages = [(stage.from_row, stage.weights) for stage in order.stages if stage.from_row < rows]
    return hashlib.sha256(repr((start, order.lanes, order.seed, rows_per_step, stages)).encode()).hexdigest()
