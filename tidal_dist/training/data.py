"""What a run reads: its stream, its held-out batches, its probe; and what is done about shards that cannot be read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from data_pipeline.errors import BadShardError, ShardError, UserError
from data_pipeline.layout import LaidOut
from data_pipeline.ledger import SourceUse
from data_pipeline.quarantine import QuarantineRecord
from data_pipeline.rows import RowReader
from data_pipeline.run_order import SPLIT, run_order, start_hash
from data_pipeline.shards import DataConfig, Manifest
from data_pipeline.stream import Batch, Loading, Share, Stream, fixed_batches
from data_pipeline.tokenizer import MixedTokenizer
from tidal_dist.config import Config
from tidal_dist.rows import row_format
from tidal_dist.training.validation import Task, generation_tasks, pictured_document

_PROBE_CANDIDATES = 4  # rows; one is enough, and it may be a CPU that has to repeat its loss


@dataclass(frozen=True)
class RunData:
    """What one rank of a run reads.

    Attributes:
        stream: the training rows, from the first on. reader: reads any of them. start: the rolling hash before them.
        validation: this rank's held-out batches. pictured: a held-out document to draw, if there is one.
        probe: a row whose loss is stored with the weights. tasks: held-out documents to continue.
        shard_names: of the training split, in order.
    """

    stream: Stream
    reader: RowReader
    start: str
    validation: list[Batch]
    pictured: LaidOut | None
    probe: Batch
    tasks: list[Task]
    shard_names: list[str]

    def leave_out(self, record: QuarantineRecord) -> None:
        """Read on without the recorded shards and rows."""
        self.stream.leave_out(record.in_order(self.shard_names), record.empty_rows())


def open_data(
    config: Config,
    manifest: Manifest,
    tokenizer: MixedTokenizer,
    record: QuarantineRecord,
    share: tuple[int, int],
    pin_memory: bool,
) -> RunData:
    """Open what rank `share[0]` of `share[1]` reads.

    Raises:
        ShardError: shards are missing, or do not fit the configuration or the number of ranks.
    """
    training, data, (rank, world) = config.training, config.data, share
    part = Share(training.batch_rows, training.accumulation_steps, rank, world)
    part.check(data.lanes)
    reader, held_out = (_reader(config, manifest, tokenizer, split, world) for split in (SPLIT, "validation"))
    order = run_order(manifest, reader.shard_rows, data, training.batch_rows, record)
    loading = Loading(data.workers, data.prefetch_steps, pin_memory)
    stream = Stream(reader, order, part, manifest.hash, loading)
    micro_rows = training.batch_rows // world // training.accumulation_steps
    batches = fixed_batches(held_out, config.validation.rows, micro_rows, share)
    probe_source = held_out if sum(held_out.shard_rows) else reader
    return RunData(
        stream=stream,
        reader=reader,
        start=start_hash(manifest, reader.shard_rows, data),
        validation=batches,
        pictured=pictured_document(held_out, tokenizer, config.model.char_positions) if batches else None,
        probe=max(fixed_batches(probe_source, _PROBE_CANDIDATES, 1, (0, 1)), key=Batch.label_count),
        tasks=generation_tasks(manifest, config.validation),
        shard_names=[entry["name"] for entry in manifest.shards(SPLIT)],
    )


def _reader(config: Config, manifest: Manifest, tokenizer: MixedTokenizer, split: str, world: int) -> RowReader:
    data, rows = config.data, replace(row_format(config), place_shift=config.model.place_shift)
    # Each lane of the rank stands in a shard of every source, and goes from one to the next.
    open_shards = 2 * (data.lanes // world) * max(1, len(set(manifest.sources(split))) if data.mix else 1)
    return RowReader(manifest, split, tokenizer, rows, data.seed, max(open_shards, 16))


def record_of_bad_shards(
    problems: Sequence[UserError | None], record: QuarantineRecord, from_row: int, data: DataConfig
) -> QuarantineRecord:
    """The quarantine record with the shards that any rank could not read at `from_row`; the same on all ranks.

    Raises:
        UserError: another problem than a shard, or shards are not quarantined, or too many would be.
    """
    found = [problem for problem in problems if problem is not None]
    bad = [problem for problem in found if isinstance(problem, BadShardError)]
    if len(bad) < len(found):
        raise next(problem for problem in found if not isinstance(problem, BadShardError))
    if data.on_bad_shard == "stop":
        raise ShardError(f"{bad[0]}; then resume, or go on without {bad[0].name}: data.on_bad_shard=quarantine")
    record = record.with_shards(bad, from_row)
    if len(record.shards) > data.max_quarantined_shards:
        raise ShardError(
            f"{bad[0]}; with it {len(record.shards)} shards cannot be read, more than "
            f"data.max_quarantined_shards={data.max_quarantined_shards}: check the disk or the store, then resume"
        )
    return record


def data_scalars(uses: Sequence[SourceUse], left_out: int) -> dict[str, float]:
    """What TensorBoard shows of the data: of each source, where there are several, and of shards left out."""
    figures = {"data/quarantined_shards": float(left_out), "data/empty_rows": float(sum(u.quarantined for u in uses))}
    for use in uses:
        prefix = f"data/{use.source}" if len(uses) > 1 else "data"
        figures |= {f"{prefix}/rows": use.rows, f"{prefix}/epochs": use.epochs, f"{prefix}/repeats": use.repeats}
    return figures
