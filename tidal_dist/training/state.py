"""Where a run stands, and how that is saved and found again."""

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_pipeline.ledger import Ledger
from data_pipeline.quarantine import QUARANTINE, QuarantineRecord
from data_pipeline.run_order import order_hash
from data_pipeline.segmentation import segmentation_hash
from data_pipeline.shards import Manifest
from tidal_dist.config import Config
from tidal_dist.errors import CheckpointError, UserError
from tidal_dist.provenance import Provenance, StoredText, corpus_of, probe_bytes, probe_loss, texts_bytes
from tidal_dist.training import checkpoint as ckpt
from tidal_dist.training import commit
from tidal_dist.training import engine as ds
from tidal_dist.training.data import RunData
from tidal_dist.training.digest import Digest
from tidal_dist.training.resume import load_weights
from tidal_dist.training.slices import shapes, step_count
from tidal_dist.training.validation import generation_quality
from tidal_dist.training.writer import Finishing, Outcome, Target, Writing, announce

_Save = tuple[int, dict[str, float]]  # the step and the metrics of its validation
_RANDOM = "dropout is seeded anew at every step from (seed, step, rank)"


@dataclass(frozen=True)
class Texts:
    """What the validation after `step` wrote."""

    step: int
    texts: list[StoredText]


@dataclass
class RunState:
    """Where a run stands, beside weights and optimizer.

    Attributes:
        step: steps made. rolling_hash: of the rows consumed; right on rank 0 alone.
        record: shards and rows that are left out. metrics: of the last validation.
        guard: what the guard of the gradients knows. early_stop: `EarlyStop.state`. Both as JSON has it.
        texts: of the last validation that this process made.
    """

    step: int
    rolling_hash: str
    record: QuarantineRecord
    metrics: dict[str, float] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)
    early_stop: dict[str, Any] = field(default_factory=dict)
    texts: Texts | None = None


class Saver:
    """Writes and reads the checkpoints of a run. At most one is being written.

    Attributes:
        loaded: how the checkpoint was loaded that the run goes on from.
    """

    def __init__(self, config: Config, manifest: Manifest, data: RunData, engine: Any, world: int):
        self._config, self._data, self._engine, self._world = config, data, engine, world
        self._folder = Path(config.run_dir) / "checkpoints"
        self._made_with = {
            "manifest_hash": manifest.hash,
            "tokenizer_hash": manifest.content["tokenizer_hash"],
            "segmentation_hash": segmentation_hash(config.segmentation),
        }
        self._corpus = corpus_of(manifest)
        self._products = {
            ckpt.CONFIG: config.to_yaml().encode(),
            ckpt.TOKENIZER: manifest.storage.read("tokenizer.json"),
            ckpt.PROBE: probe_bytes(data.probe),
        }
        self._saved: _Save = (0, {})
        self._last_error = ""
        self._best = dict.fromkeys(_QUALITY, -math.inf)
        self._judged: dict[str, float] | None = None  # metrics that a save has compared with the best
        self._writing: Writing | None = None
        self._begun: _Save | None = None  # what `_writing` saves
        self._untold: list[Outcome] = []
        self._seconds, self._since = 0.0, time.monotonic()
        self.loaded: dict[str, Any] = {}

    def stand(self, checkpoint: Path, record: QuarantineRecord) -> RunState:
        """Where the run stood, without its weights.

        Raises:
            CheckpointError: the checkpoint belongs to another run, order or quarantine record.
        """
        return self._stand(checkpoint, ckpt.load_state(checkpoint), record)

    def _stand(self, checkpoint: Path, state: ckpt.TrainingState, record: QuarantineRecord) -> RunState:
        made = state.provenance
        found = vars(made) | vars(state)
        for name, value in (self._made_with | {"order_hash": self._order_hash(made.rows)}).items():
            if found[name] != value:
                raise CheckpointError(
                    f"{checkpoint}: {name.replace('_', ' ')} {found[name]} there, {value} in this run; "
                    "resume with what the checkpoint was trained with, or start in another run_dir"
                )
        if record.before(made.rows) != made.quarantine:
            raise CheckpointError(
                f"{Path(self._config.run_dir) / QUARANTINE}: not the record that {checkpoint.name} was trained with "
                f"(left out there: {made.quarantine or 'nothing'}); restore it, or start in another run_dir"
            )
        kept = {name: state.extra.get(name, {}) for name in ("guard", "early_stop")}
        return RunState(made.step, made.rolling_hash, record, made.metrics, **kept)

    def load(self, checkpoint: Path, record: QuarantineRecord) -> RunState:
        """Load weights and optimizer on all ranks, from whatever layout, and prove them equal; where the run stood.

        Raises:
            CheckpointError: the checkpoint does not belong to this run, or what was loaded is not what was saved.
        """
        self.wait()
        state = ckpt.load_state(checkpoint)
        stood = self._stand(checkpoint, state, record)
        self.loaded = load_weights(self._engine, checkpoint, state, self._config, self._layout, self._data.probe)
        self._saved, self._judged = (stood.step, stood.metrics), stood.metrics
        for mark, quality in _QUALITY.items():
            self._best[mark] = quality(ckpt.best_metrics(self._folder, mark))
        self._seconds, self._since = state.train_seconds, time.monotonic()
        return stood

    def save(self, state: RunState) -> None:
        """Begin a checkpoint on all ranks, unless that of this step and its validation is there or under way.

        Training waits only for the copy to host memory, and for an earlier checkpoint that is still being written;
        whether this one succeeds, `finished` tells later.
        """
        if (state.step, state.metrics) in (self._saved, self._begun) or not state.step:
            return
        self.wait()
        began = time.monotonic()
        target = self._target(state.step)
        try:
            ds.from_first_rank(lambda: _make_folder(target))
            ds.together(lambda: announce(target.partial, dist.get_rank()))
        except UserError as error:
            self._last_error = str(error)
            self._untold.append(Outcome(state.step, error=str(error)))
            return
        saved = self._training_state(state)
        copied = ckpt.copy_to_host(self._engine, target.partial)
        ds.synchronize()
        finishing = self._finishing(state, saved, target) if dist.get_rank() == 0 else None
        self._writing, self._begun = Writing(target, dist.get_rank(), copied, finishing), (state.step, state.metrics)
        self._writing.start()
        if not self._config.training.save_in_background:
            self._writing.wait()
        self._writing.outcome.stall_seconds = time.monotonic() - began

    def save_last(self, state: RunState) -> None:
        """Write the checkpoint that a run ends with, on all ranks, or wait for it where it is under way.

        Raises:
            UserError: it could not be written.
        """
        self.save(state)
        self.wait()
        if state.step and self._saved[0] != state.step:
            raise UserError(
                f"{commit.final_folder(self._folder, state.step)}: cannot write the last checkpoint "
                f"({self._last_error}); free space, then resume"
            )

    def finished(self) -> list[Outcome]:
        """What has become of the saves that ended since the last call; of other ranks' parts only rank 0 knows."""
        if self._writing and self._writing.is_done():
            self._take(self._writing)
        told, self._untold = self._untold, []
        return told

    def _take(self, writing: Writing) -> None:
        if not writing.is_taken:
            writing.is_taken = True
            self._untold.append(writing.outcome)

    def wait(self) -> None:
        """Wait, on all ranks, until nothing is being written."""
        if self._writing is None:
            return
        self._writing.wait()
        self._take(self._writing)
        outcome: Outcome = ds.gather_objects(self._writing.outcome)[0]
        if outcome.is_committed and self._begun:
            self._saved = self._begun
        self._writing, self._begun, self._last_error = None, None, outcome.error or ""

    def _target(self, step: int) -> Target:
        final, partial = commit.final_folder(self._folder, step), commit.partial_folder(self._folder, step)
        timeout = 60.0 * self._config.training.collective_timeout_minutes
        return Target(partial, final, step, self._world, timeout)

    def _training_state(self, state: RunState) -> ckpt.TrainingState:
        rows, training = state.step * self._config.training.batch_rows, self._config.training
        provenance = Provenance(
            run=self._config.run_dir,
            config_hash=hashlib.sha256(self._products[ckpt.CONFIG]).hexdigest(),
            step=state.step,
            rows=rows,
            rolling_hash=state.rolling_hash,
            precision=ds.precision(training),
            probe_loss=probe_loss(self._engine, self._data.probe, ds.device()),
            metrics=state.metrics,
            quarantine=state.record.before(rows),
            **self._made_with,
        )
        schedule: dict[str, Any] = {"kind": training.schedule, "step": state.step, "steps": training.steps}
        schedule |= {"warmup_steps": training.warmup_steps, "decay_steps": training.decay_steps}
        return ckpt.TrainingState(
            provenance,
            self._world,
            self._order_hash(rows),
            self._seconds + time.monotonic() - self._since,
            layout=self._layout,
            optimizer_steps=step_count(self._engine),
            schedule=schedule,
            random={"rule": _RANDOM, "seed": training.seed},
            extra=deepcopy({"guard": state.guard, "early_stop": state.early_stop}),
        )

    def _finishing(self, state: RunState, saved: ckpt.TrainingState, target: Target) -> Finishing:
        """What rank 0 does at the end of a save: `state.json` with the digests, marks of the best, removing the old."""
        is_new = state.metrics is not self._judged
        self._judged = state.metrics
        found = {mark: quality(state.metrics) for mark, quality in _QUALITY.items()}
        marks = [mark for mark in found if is_new and found[mark] > self._best[mark]]
        best = {mark: max(self._best[mark], found[mark]) for mark in marks}
        saved = replace(saved, best={mark: value for mark, value in (self._best | best).items() if value > -math.inf})
        uses = [asdict(use) for use in Ledger(self._data.stream.order).at(saved.provenance.rows)]
        saved = replace(saved, extra=saved.extra | {"coverage": uses, "corpus": self._corpus})
        texts = {}
        if state.texts and state.texts.step == state.step:  # those of an earlier step are not what these weights write
            texts = {ckpt.TEXTS: texts_bytes(state.texts.texts)}
        shape_of, metrics = shapes(self._engine), dict(state.metrics)
        training = self._config.training

        def files(digests: dict[str, Digest]) -> dict[str, bytes]:
            parameters = {name: {"shape": shape_of[name], "digest": list(digest)} for name, digest in digests.items()}
            return self._products | texts | {ckpt.STATE: replace(saved, parameters=parameters).as_json()}

        def after() -> None:
            for mark in marks:
                commit.mark_best(self._folder, mark, target.final, metrics)
                self._best[mark] = best[mark]
            commit.remove_old(self._folder, target.step, training.keep_checkpoints, training.keep_every_steps)

        return Finishing(files, after)

    @cached_property
    def _layout(self) -> dict[str, Any]:
        return ds.layout(self._config, self._world)  # DeepSpeed reads its whole configuration for it

    def _order_hash(self, rows: int) -> str:
        return order_hash(self._data.start, self._data.stream.order, self._config.training.batch_rows, rows)


def _make_folder(target: Target) -> None:
    """Make the folder that a checkpoint is written to, and remove what killed processes left beside it.

    Raises:
        UserError: the disk refuses.
    """
    commit.clean_up(target.partial.parent)
    try:
        target.partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{target.partial}: cannot make this folder ({error.strerror})") from None


def _loss(metrics: Mapping[str, float]) -> float:
    """By the loss on held-out rows."""
    return -metrics["validation/loss"] if "validation/loss" in metrics else -math.inf


# What the best checkpoint is chosen by, more is better, and the file that names it.
_QUALITY: dict[str, Callable[[Mapping[str, float]], float]] = {commit.BEST: generation_quality, commit.BEST_LOSS: _loss}
