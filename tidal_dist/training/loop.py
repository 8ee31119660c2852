"""The training loop, from top to bottom."""

import math
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from data_pipeline.files import replace_file
from data_pipeline.ledger import Ledger
from data_pipeline.ordering import advance
from data_pipeline.quarantine import QUARANTINE, QuarantineRecord
from data_pipeline.rows import has_row_plan, row_format_of, write_row_plan
from data_pipeline.segmentation import segmentation_hash
from data_pipeline.shards import Manifest
from data_pipeline.stream import Step, Stream
from data_pipeline.tokenizer import MixedTokenizer
from tidal_dist.config import Config, TrainingConfig
from tidal_dist.errors import CheckpointError, ConfigError, UserError
from tidal_dist.history.log import Line, RollingLog
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.training import checkpoint as ckpt
from tidal_dist.training import engine as ds
from tidal_dist.training.data import RunData, data_scalars, open_data, record_of_bad_shards
from tidal_dist.training.monitor import Monitor, Pace
from tidal_dist.training.state import RunState, Saver
from tidal_dist.training.validation import validation_generation, validation_loss, validation_pictures


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warm-up, then constant, then a cosine or linear decay to `final_learning_rate` at the last step."""
    decay_steps = min(config.decay_steps or config.steps, max(config.steps - config.warmup_steps, 1))
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    decayed = max(0, step - (config.steps - decay_steps)) / decay_steps
    kept = 0.5 * (1 + math.cos(math.pi * decayed)) if config.schedule == "cosine" else 1 - decayed
    return warm * (config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * kept)


def train(config: Config, resume: bool = False) -> None:
    """Train as configured, on all ranks of the launcher.

    Raises:
        UserError: configuration, shards or checkpoint do not fit.
    """
    manifest = Manifest.of(config.data)
    tokenizer = manifest.tokenizer()
    _check_segmentation(config, manifest)
    with ds.process_group(config.training) as (rank, world):
        _train(config, resume, manifest, tokenizer, rank, world)


def _train(config: Config, resume: bool, manifest: Manifest, tokenizer: MixedTokenizer, rank: int, world: int) -> None:
    training, run = config.training, Path(config.run_dir)
    newest = ds.from_first_rank(lambda: _starting_point(config, resume, manifest))
    record = ds.from_first_rank(lambda: QuarantineRecord.load(run, manifest.hash))
    data = ds.together(lambda: open_data(config, manifest, tokenizer, record, (rank, world), ds.uses_pinned_memory()))

    def build_model() -> TidalTransformer:
        checkpointing = ds.activation_checkpoint(training)
        return TidalTransformer(
            config.model, tokenizer.vocab_size, tokenizer.segmentation.max_block_bytes, checkpointing
        )

    engine = ds.build_engine(config, world, build_model)
    saver = Saver(config, manifest, data, engine, world)
    state = saver.load(newest, record) if newest else RunState(0, data.start, record)
    _seek(data.stream, state, training.batch_rows)
    if rank == 0:
        replace_file(run / "config.yaml", config.to_yaml().encode())
    with closing(Monitor(run / "tensorboard", rank, state.step, training.steps)) as monitor:
        parameters = f"{_parameters(engine.module):,} parameters"
        monitor.line(f"{world} ranks, {parameters}, from step {state.step} of {training.steps}")
        _loop(config, data, tokenizer, engine, state, saver, monitor, rank, world)


def _loop(
    config: Config,
    data: RunData,
    tokenizer: MixedTokenizer,
    engine: Any,
    state: RunState,
    saver: Saver,
    monitor: Monitor,
    rank: int,
    world: int,
) -> None:
    training, run, rows_per_step = config.training, Path(config.run_dir), config.training.batch_rows
    ledger, pace = Ledger(data.stream.order), Pace(world)
    if rank == 0:
        here = Line(state.step, state.step * rows_per_step, state.rolling_hash)
        log = RollingLog(run, Line(0, 0, data.start), here)
        if state.step:
            monitor.line(f"data so far: {'; '.join(use.as_text() for use in ledger.at(here.rows))}")
    engine.train()
    while state.step < training.steps:
        with pace.waiting():
            taken = _next(data.stream)
        if ds.any_rank(isinstance(taken, UserError)):
            _leave_out_bad_shards(config, data, taken, state, saver, monitor)
            ledger = Ledger(data.stream.order)
            continue
        assert isinstance(taken, Step)
        # Dropout depends on seed, step and rank alone, so a resumed run draws the same.
        torch.manual_seed(hash((training.seed, state.step, rank)) & 0x7FFFFFFF)
        rate = learning_rate(training, state.step)
        loss, labels, gradient_norm = ds.train_step(engine, taken.batches, rate)
        state.rolling_hash = advance(state.rolling_hash, taken.identity_sum)
        state.step += 1
        pace.add(taken.batches)

        is_last = state.step == training.steps
        rows = state.step * rows_per_step
        if rank == 0 and (state.step % training.log_every_steps == 0 or is_last):
            log.add(Line(state.step, rows, state.rolling_hash))
            speed = pace.restart()
            monitor.scalars(
                state.step,
                {
                    "train/loss": loss,
                    "train/learning_rate": rate,
                    "train/gradient_norm": gradient_norm,
                    "train/labels_per_step": labels,
                    "data/rows": rows,
                }
                | data_scalars(ledger.at(rows), len(state.record.shards))
                | speed,
            )
            seconds = speed["speed/seconds_per_step"]
            monitor.progress(state.step, {"loss": f"{loss:.4f}", "s/step": f"{seconds:.3f}"})
        if state.step % config.validation.every_steps == 0 or is_last:
            with pace.pausing():
                state.metrics = _validate(engine, tokenizer, data, config, (rank, world), monitor, state.step)
        if state.step % training.save_every_steps == 0 or state.step % config.validation.every_steps == 0 or is_last:
            with pace.pausing():
                saver.save(state)
                monitor.text(state.step, "data/rolling_hash", state.rolling_hash)


def _starting_point(config: Config, resume: bool, manifest: Manifest) -> Path | None:
    """The checkpoint to resume from, if any; makes the row plan where there is none.

    Raises:
        UserError: there is no checkpoint to resume from, one that must not be overwritten, or rows cannot be planned.
    """
    row_format = row_format_of(config.data)
    if not has_row_plan(manifest, row_format):
        write_row_plan(manifest, row_format)
    checkpoints = Path(config.run_dir) / "checkpoints"
    found = ckpt.complete_checkpoints(checkpoints)
    if found and not resume:
        raise CheckpointError(f"{checkpoints}: holds checkpoints of an earlier run; give --resume or another run_dir")
    if resume and not found:
        raise CheckpointError(f"{checkpoints}: no complete checkpoint to resume from; start without --resume")
    return found[-1] if found else None


def _next(stream: Stream) -> Step | UserError:
    """The next step, or why this rank cannot read it."""
    try:
        return next(stream)
    except UserError as error:
        return error


def _seek(stream: Stream, state: RunState, rows_per_step: int) -> None:
    stream.load_state_dict(stream.state_dict() | {"rows": state.step * rows_per_step})


def _leave_out_bad_shards(
    config: Config, data: RunData, taken: Step | UserError, state: RunState, saver: Saver, monitor: Monitor
) -> None:
    """Agree with the other ranks on the shards that one of them cannot read; all read the step again, without them.

    Raises:
        UserError: the run must stop, on all ranks; what it has learnt is saved.
    """
    rows = state.step * config.training.batch_rows
    problems = ds.gather_objects(taken if isinstance(taken, UserError) else None)
    try:
        record = record_of_bad_shards(problems, state.record, rows, config.data)
    except UserError:
        saver.save(state)
        raise
    ds.from_first_rank(lambda: record.write(Path(config.run_dir)))
    for shard in set(record.shards) - set(state.record.shards):
        monitor.line(f"step {state.step + 1}: left out {shard.name} from row {shard.from_row} on: {shard.reason}")
    monitor.line(f"{QUARANTINE} holds {len(record.shards)} shards; a replay leaves out the same rows")
    state.record = record
    data.leave_out(record)
    _seek(data.stream, state, config.training.batch_rows)


def _validate(
    engine: Any,
    tokenizer: MixedTokenizer,
    data: RunData,
    config: Config,
    share: tuple[int, int],
    monitor: Monitor,
    step: int,
) -> dict[str, float]:
    """Loss, bits per byte and generation on the held-out split; {} where nothing is held out."""
    if data.pictured is None:
        return {}
    engine.eval()
    loss, bits = validation_loss(engine, data.validation)
    quality = validation_generation(engine.module, tokenizer, data.tasks, share, config.validation.max_bytes)
    pictures = validation_pictures(engine.module, tokenizer, data.pictured, draws=share[0] == 0)
    engine.train()
    metrics = {
        "validation/loss": loss,
        "validation/bits_per_byte": bits,
        "validation/exact_match": quality.exact_match,
        "validation/off_canonical_joins_per_block": quality.off_canonical_joins_per_block,
    }
    monitor.scalars(step, metrics)
    monitor.text(step, "validation/generated", quality.examples)
    for name, png in pictures.items():
        monitor.image(step, name, png)
    monitor.line(f"step {step}: " + " ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
    return metrics


def _check_segmentation(config: Config, manifest: Manifest) -> None:
    if segmentation_hash(config.segmentation) != manifest.content["segmentation_hash"]:
        raise ConfigError(
            f"{manifest.where}: the shards were made with another segmentation ({manifest.content['segmentation']}) "
            "than the configuration's; prepare the shards anew or set segmentation.* as they have it"
        )


def _parameters(model: torch.nn.Module) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
