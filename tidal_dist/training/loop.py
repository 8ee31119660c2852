"""The training loop, from top to bottom."""

import hashlib
import math
import time
from pathlib import Path
from typing import Any

import torch

from data_pipeline.files import replace_file
from data_pipeline.ordering import Order
from data_pipeline.rows import RowFormat, RowReader, plan_folder, roll, write_row_plan
from data_pipeline.segmentation import segmentation_hash
from data_pipeline.shards import Manifest
from data_pipeline.stream import Share, StepDataset, fixed_batches, load_steps
from data_pipeline.tokenizer import MixedTokenizer
from tidal_dist.config import Config, TrainingConfig
from tidal_dist.errors import CheckpointError, ConfigError
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.provenance import Provenance, probe_bytes, probe_loss
from tidal_dist.training import checkpoint as ckpt
from tidal_dist.training import engine as ds
from tidal_dist.training.monitor import Monitor
from tidal_dist.training.validation import (
    generation_tasks,
    pictured_document,
    validation_generation,
    validation_loss,
    validation_pictures,
)

_PROBE_ROWS = 4


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
    manifest = Manifest.load(config.data.shards)
    tokenizer = manifest.tokenizer()
    _check_segmentation(config, manifest)
    with ds.process_group(config.training) as (rank, world):
        _train(config, resume, manifest, tokenizer, rank, world)


def _train(config: Config, resume: bool, manifest: Manifest, tokenizer: MixedTokenizer, rank: int, world: int) -> None:
    training, data = config.training, config.data
    run, checkpoints = Path(config.run_dir), Path(config.run_dir) / "checkpoints"
    if rank == 0:
        if not (plan_folder(manifest, data.row_tokens, data.row_chars) / "plan.json").exists():
            write_row_plan(manifest, data.row_tokens, data.row_chars)
        found = ckpt.complete_checkpoints(checkpoints)
    else:
        found = []
    newest = ds.gather_objects(found[-1] if found else None)[0]
    if newest and not resume:
        raise CheckpointError(f"{checkpoints}: holds checkpoints of an earlier run; give --resume or another run_dir")
    if resume and not newest:
        raise CheckpointError(f"{checkpoints}: no complete checkpoint to resume from; start without --resume")
    if rank == 0:
        replace_file(run / "config.yaml", config.to_yaml().encode())

    row_format = RowFormat(data.row_tokens, data.row_chars, config.model.char_positions, config.model.place_shift)
    reader = RowReader(manifest, "train", tokenizer, row_format, data.seed)
    held_out = RowReader(manifest, "validation", tokenizer, row_format, data.seed)
    order = Order(reader.shard_rows, data.lanes, data.seed)
    share = Share(training.batch_rows, training.accumulation_steps, rank, world)
    share.check(data.lanes)
    micro_rows = training.batch_rows // world // training.accumulation_steps
    validation_batches = fixed_batches(held_out, config.validation.rows, micro_rows, (rank, world))
    pictured = pictured_document(held_out, tokenizer, config.model.char_positions) if validation_batches else None
    probe_source = held_out if sum(held_out.shard_rows) else reader
    probe = fixed_batches(probe_source, _PROBE_ROWS, _PROBE_ROWS, (0, 1))[0]
    tasks = generation_tasks(manifest, config.validation)

    def build_model() -> TidalTransformer:
        checkpointing = ds.activation_checkpoint(training)
        return TidalTransformer(
            config.model, tokenizer.vocab_size, tokenizer.segmentation.max_block_bytes, checkpointing
        )

    engine = ds.build_engine(config, world, build_model)
    made_with = {
        "manifest_hash": manifest.hash,
        "tokenizer_hash": tokenizer.hash,
        "segmentation_hash": segmentation_hash(tokenizer.segmentation),
    }
    order_hash = _order_hash(config, manifest)
    products = {
        ckpt.CONFIG: config.to_yaml().encode(),
        ckpt.TOKENIZER: (manifest.folder / "tokenizer.json").read_bytes(),
        ckpt.PROBE: probe_bytes(probe),
    }
    step, rolling_hash, best, seconds_before = 0, manifest.hash, -math.inf, 0.0
    metrics: dict[str, float] = {}
    if newest:
        state = ckpt.load_checkpoint(engine, newest, made_with | {"ranks": world, "order_hash": order_hash})
        step, rolling_hash, metrics = state.provenance.step, state.provenance.rolling_hash, state.provenance.metrics
        seconds_before = state.train_seconds
        best = _quality(ckpt.best_metrics(checkpoints))
    monitor = Monitor(run / "tensorboard", rank, step, training.steps)
    monitor.line(f"{world} ranks, {_parameters(engine.module):,} parameters, from step {step} of {training.steps}")

    stream = load_steps(StepDataset(reader, order, share, step), data.workers, ds.uses_pinned_memory())
    engine.train()
    started = window_started = time.monotonic()
    window_bytes = window_tokens = window_wait = 0.0
    while step < training.steps:
        waiting = time.monotonic()
        batches = next(stream)
        window_wait += time.monotonic() - waiting
        # Dropout depends on seed, step and rank alone, so a resumed run draws the same.
        torch.manual_seed(hash((training.seed, step, rank)) & 0x7FFFFFFF)
        rate = learning_rate(training, step)
        loss, labels, gradient_norm = ds.train_step(engine, batches, rate)
        rolling_hash = roll(rolling_hash, order, range(step * training.batch_rows, (step + 1) * training.batch_rows))
        step += 1
        window_bytes += sum(b.byte_count() for b in batches) * world
        window_tokens += sum(b.token_count() for b in batches) * world

        if step % training.log_every_steps == 0 or step == training.steps:
            elapsed = time.monotonic() - window_started
            steps = (step - 1) % training.log_every_steps + 1
            monitor.scalars(
                step,
                {
                    "train/loss": loss,
                    "train/learning_rate": rate,
                    "train/gradient_norm": gradient_norm,
                    "train/labels_per_step": labels,
                    "speed/tokens_per_second": window_tokens / elapsed,
                    "speed/bytes_per_second": window_bytes / elapsed,
                    "speed/seconds_per_step": elapsed / steps,
                    "speed/data_wait_share": window_wait / elapsed,
                    "data/rows": step * training.batch_rows,
                    "data/epoch": step * training.batch_rows / order.rows_per_epoch,
                },
            )
            monitor.progress(step, {"loss": f"{loss:.4f}", "s/step": f"{elapsed / steps:.3f}"})
            window_started, window_bytes, window_tokens, window_wait = time.monotonic(), 0.0, 0.0, 0.0

        is_last = step == training.steps
        if step % config.validation.every_steps == 0 or is_last:
            pausing = time.monotonic()
            metrics = _validate(
                engine, tokenizer, validation_batches, pictured, tasks, config, (rank, world), monitor, step
            )
            window_started += time.monotonic() - pausing
        if step % training.save_every_steps == 0 or step % config.validation.every_steps == 0 or is_last:
            pausing = time.monotonic()
            provenance = Provenance(
                run=config.run_dir,
                config_hash=hashlib.sha256(products[ckpt.CONFIG]).hexdigest(),
                step=step,
                rows=step * training.batch_rows,
                rolling_hash=rolling_hash,
                precision="bf16" if ds.uses_bf16(training) else "fp32",
                probe_loss=probe_loss(engine, probe, ds.device()),
                metrics=metrics,
                **made_with,
            )
            state = ckpt.TrainingState(provenance, world, order_hash, seconds_before + time.monotonic() - started)
            is_best = _quality(metrics) > best
            best = max(best, _quality(metrics))
            ckpt.save_checkpoint(engine, checkpoints, state, products, is_best, training.keep_checkpoints)
            monitor.text(step, "data/rolling_hash", rolling_hash)
            window_started += time.monotonic() - pausing
    monitor.close()


def _validate(
    engine: Any,
    tokenizer: Any,
    batches: list[Any],
    pictured: Any,
    tasks: list[Any],
    config: Config,
    share: tuple[int, int],
    monitor: Monitor,
    step: int,
) -> dict[str, float]:
    """Loss, bits per byte and generation on the held-out split; {} where nothing is held out."""
    if not batches:
        return {}
    engine.eval()
    loss, bits = validation_loss(engine, batches)
    quality = validation_generation(engine.module, tokenizer, tasks, share, config.validation.max_bytes)
    pictures = validation_pictures(engine.module, tokenizer, pictured, draws=share[0] == 0)
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


def _quality(metrics: dict[str, float]) -> float:
    """What the best checkpoint is chosen by: exact match, then bits per byte."""
    if not metrics:
        return -math.inf
    return metrics["validation/exact_match"] - 1e-6 * metrics["validation/bits_per_byte"]


def _check_segmentation(config: Config, manifest: Manifest) -> None:
    if segmentation_hash(config.segmentation) != manifest.content["segmentation_hash"]:
        raise ConfigError(
            f"{manifest.folder}: the shards were made with another segmentation ({manifest.content['segmentation']}) "
            "than the configuration's; prepare the shards anew or set segmentation.* as they have it"
        )


def _order_hash(config: Config, manifest: Manifest) -> str:
    """Hash of everything that the order of the rows depends on."""
    data = config.data
    parts = (manifest.hash, data.row_tokens, data.row_chars, data.lanes, data.seed, config.training.batch_rows)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _parameters(model: torch.nn.Module) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
