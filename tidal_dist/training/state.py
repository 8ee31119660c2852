"""Where a run stands, and how that is saved and found again."""

import hashlib
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.quarantine import QUARANTINE, QuarantineRecord
from data_pipeline.run_order import order_hash
from data_pipeline.segmentation import segmentation_hash
from data_pipeline.shards import Manifest
from tidal_dist.config import Config
from tidal_dist.errors import CheckpointError
from tidal_dist.provenance import Provenance, probe_bytes, probe_loss
from tidal_dist.training import checkpoint as ckpt
from tidal_dist.training import engine as ds
from tidal_dist.training.data import RunData


@dataclass
class RunState:
    """Where a run stands, beside weights and optimizer.

    Attributes:
        step: steps made. rolling_hash: of the rows consumed; right on rank 0 alone.
        record: shards that are left out. metrics: of the last validation.
    """

    step: int
    rolling_hash: str
    record: QuarantineRecord
    metrics: dict[str, float] = field(default_factory=dict)


class Saver:
    """Writes and reads the checkpoints of a run."""

    def __init__(self, config: Config, manifest: Manifest, data: RunData, engine: Any, world: int):
        self._config, self._data, self._engine, self._world = config, data, engine, world
        self._folder = Path(config.run_dir) / "checkpoints"
        self._made_with = {
            "manifest_hash": manifest.hash,
            "tokenizer_hash": manifest.content["tokenizer_hash"],
            "segmentation_hash": segmentation_hash(config.segmentation),
        }
        self._products = {
            ckpt.CONFIG: config.to_yaml().encode(),
            ckpt.TOKENIZER: manifest.storage.read("tokenizer.json"),
            ckpt.PROBE: probe_bytes(data.probe),
        }
        self._saved_step, self._best = 0, -math.inf
        self._seconds, self._since = 0.0, time.monotonic()

    def load(self, checkpoint: Path, record: QuarantineRecord) -> RunState:
        """Load weights and optimizer on all ranks; where the run stood.

        Raises:
            CheckpointError: the checkpoint belongs to another run, number of ranks, order or quarantine record.
        """
        made = ckpt.load_state(checkpoint).provenance
        if record.before(made.rows) != made.quarantine:
            raise CheckpointError(
                f"{Path(self._config.run_dir) / QUARANTINE}: not the record that {checkpoint.name} was trained with "
                f"(left out there: {made.quarantine or 'nothing'}); restore it, or start in another run_dir"
            )
        expected = self._made_with | {"ranks": self._world, "order_hash": self._order_hash(made.rows)}
        state = ckpt.load_checkpoint(self._engine, checkpoint, expected)
        self._saved_step, self._best = made.step, _quality(ckpt.best_metrics(self._folder))
        self._seconds, self._since = state.train_seconds, time.monotonic()
        return RunState(made.step, made.rolling_hash, record, made.metrics)

    def save(self, state: RunState) -> None:
        """Write a checkpoint from all ranks, unless that of this step is there."""
        if state.step == self._saved_step:
            return
        rows, training = state.step * self._config.training.batch_rows, self._config.training
        provenance = Provenance(
            run=self._config.run_dir,
            config_hash=hashlib.sha256(self._products[ckpt.CONFIG]).hexdigest(),
            step=state.step,
            rows=rows,
            rolling_hash=state.rolling_hash,
            precision="bf16" if ds.uses_bf16(training) else "fp32",
            probe_loss=probe_loss(self._engine, self._data.probe, ds.device()),
            metrics=state.metrics,
            quarantine=state.record.before(rows),
            **self._made_with,
        )
        seconds = self._seconds + time.monotonic() - self._since
        saved = ckpt.TrainingState(provenance, self._world, self._order_hash(rows), seconds)
        is_best = _quality(state.metrics) > self._best
        self._best = max(self._best, _quality(state.metrics))
        ckpt.save_checkpoint(self._engine, self._folder, saved, self._products, is_best, training.keep_checkpoints)
        self._saved_step = state.step

    def _order_hash(self, rows: int) -> str:
        return order_hash(self._data.start, self._data.stream.order, self._config.training.batch_rows, rows)


def _quality(metrics: dict[str, float]) -> float:
    """What the best checkpoint is chosen by: exact match, then bits per byte."""
    if not metrics:
        return -math.inf
    return metrics["validation/exact_match"] - 1e-6 * metrics["validation/bits_per_byte"]
