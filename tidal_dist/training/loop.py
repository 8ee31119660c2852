"""The training loop, from top to bottom."""

import math

import numpy as np
import torch

from data_pipeline.ledger import Ledger
from data_pipeline.ordering import advance
from data_pipeline.quarantine import QUARANTINE
from data_pipeline.stream import Step, Stream
from tidal_dist.config import TrainingConfig
from tidal_dist.errors import UserError
from tidal_dist.gpus import peak_tflops
from tidal_dist.history.log import Line, RollingLog
from tidal_dist.training import engine as ds
from tidal_dist.training.bad_steps import go_back, leave_out_step, must_go_back
from tidal_dist.training.data import data_scalars, record_of_bad_shards
from tidal_dist.training.early_stop import EarlyStop
from tidal_dist.training.gradients import global_gradient_norm, gradient_norms, owned_gradients
from tidal_dist.training.guard import Guard
from tidal_dist.training.layers import norms_by_layer, owned_weights, samples
from tidal_dist.training.monitor import RESULTS, flat_settings
from tidal_dist.training.pace import Pace, Work, host_memory, measured_tflops
from tidal_dist.training.run import Run
from tidal_dist.training.state import RunState, Texts
from tidal_dist.training.stopping import next_step, owes_validation
from tidal_dist.training.telling import tell_saves
from tidal_dist.training.validation import (
    Outcome,
    as_markdown,
    generation_metrics,
    validation_generation,
    validation_loss,
    validation_match,
    validation_pictures,
)


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warm-up, then constant, then a cosine or linear decay to `final_learning_rate` at the last step."""
    decay_steps = min(config.decay_steps or config.steps, max(config.steps - config.warmup_steps, 1))
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    decayed = max(0, step - (config.steps - decay_steps)) / decay_steps
    kept = 0.5 * (1 + math.cos(math.pi * decayed)) if config.schedule == "cosine" else 1 - decayed
    return warm * (config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * kept)


def run_steps(run: Run, state: RunState) -> RunState | str:
    """Train to the end: why it ended. Or up to where the run goes back: where it goes on from.

    Raises:
        Stopped: the run is asked to stop. UserError: it cannot go on.
    """
    config, training, data, monitor, watch = run.config, run.config.training, run.data, run.monitor, run.watch
    phases = watch.phases
    ledger, guard = Ledger(data.stream.order), Guard(config.guard, state.guard)
    early_stop = EarlyStop.resumed(config.validation, state.early_stop)
    if not state.step:
        monitor.settings(flat_settings(config), RESULTS)
    pace = Pace(run.world, phases, _work(run), _label_bytes(run))
    if run.rank == 0:
        here = Line(state.step, state.step * run.rows_per_step, state.rolling_hash)
        log = RollingLog(run.folder, Line(0, 0, data.start), here)
        if state.step:
            monitor.line(f"data so far: {'; '.join(use.as_text() for use in ledger.at(here.rows))}")
    run.engine.train()
    watch.heartbeat.step(state.step)
    if owes_validation(run, state):
        with phases("validation"):
            _validate(run, state, early_stop)
        run.saver.save(state)
    while state.step < training.steps:
        is_last = state.step + 1 == training.steps
        is_logged = is_last or (state.step + 1) % training.log_every_steps == 0
        is_validated = is_last or (state.step + 1) % config.validation.every_steps == 0
        is_saved = is_validated or (state.step + 1) % training.save_every_steps == 0
        phases.measured = is_logged

        with phases("data"):
            taken = next_step(data.stream, watch.interrupts)
        with phases("agree"):
            agreed = watch.meeting.agree(bad_shard=isinstance(taken, UserError))
        if agreed["bad_shard"]:
            _leave_out_bad_shards(run, taken, state)
            ledger = Ledger(data.stream.order)
            continue
        assert isinstance(taken, Step)
        # Dropout depends on seed, step and rank alone, so a resumed run draws the same.
        torch.manual_seed(hash((training.seed, state.step, run.rank)) & 0x7FFFFFFF)
        rate = learning_rate(training, state.step)
        loss, labels = ds.pass_batches(run.engine, taken.batches, phases)
        with phases("agree"):
            gradient_norm = global_gradient_norm(run.engine) if labels else 0.0
            norms = norms_by_layer(gradient_norms(run.engine)) if labels and is_logged else {}
        gradients = samples(owned_gradients(run.engine)) if labels and is_validated and run.rank == 0 else {}
        bad = guard.judge(loss, gradient_norm)
        if bad:
            ds.discard_step(run.engine)
            leave_out_step(run, state, taken.batches, bad)
            ledger = Ledger(data.stream.order)
        else:
            state.rolling_hash = advance(state.rolling_hash, taken.identity_sum)
        is_made = labels > 0 and not bad
        if is_made:
            ds.apply_step(run.engine, rate, phases)
            guard.accept(gradient_norm)
        state.step += 1
        watch.heartbeat.step(state.step)
        pace.add(taken.batches)
        tell_saves(run)
        if not watch.startup.is_over:
            monitor.line(watch.startup.first_step())
        if not is_made and must_go_back(run, state):
            return go_back(run, state)

        rows = state.step * run.rows_per_step
        if run.rank == 0 and is_logged:
            log.add(Line(state.step, rows, state.rolling_hash))
            speed = pace.take()
            monitor.scalars(
                state.step,
                ({"train/loss": loss, "train/gradient_norm": gradient_norm} if is_made else {})
                | {
                    "train/learning_rate": rate,
                    "train/labels_per_step": labels if is_made else 0,
                    "data/rows": rows,
                }
                | data_scalars(ledger.at(rows), len(state.record.shards))
                | guard.scalars()
                | {f"gradient_norm/{layer}": norm for layer, norm in norms.items()}
                | (speed | host_memory() | ds.peak_memory()),
            )
            figures = {"loss": f"{loss:.4f}"} if is_made else {"not": "made"}
            monitor.progress(state.step, figures | {"s/step": f"{speed['speed/seconds_per_step']:.3f}"})
        if is_validated:
            with phases("validation"):
                _validate(run, state, early_stop)
                monitor.histograms(state.step, "gradients", gradients)
        if is_saved:
            with phases("checkpoint"), watch.interrupts.saving():
                monitor.text(state.step, "data/rolling_hash", state.rolling_hash)
                monitor.text(state.step, "data/mix", "\n\n".join(use.as_text() for use in ledger.at(rows)))
                monitor.flush()
                run.saver.save(state)
        if early_stop.reason:
            return early_stop.reason
    return f"all {training.steps:,} steps are made"


def seek(stream: Stream, state: RunState, rows_per_step: int) -> None:
    """Let a stream go on where the run stands."""
    stream.load_state_dict(stream.state_dict() | {"rows": state.step * rows_per_step})


def _work(run: Run) -> Work:
    """What a step costs; measures the device where nobody has said what it can do."""
    precision = ds.precision(run.config.training)
    peak = run.config.monitor.peak_tflops or peak_tflops(ds.device_name(), precision)
    if peak is None:
        peak = measured_tflops(ds.device(), torch.bfloat16 if precision == "bf16" else torch.float32)
        run.monitor.line(f"no peak of this device is known: a large matrix product makes {peak:.3g} TFLOP/s")
    return Work.of(run.config, run.world, peak, run.data.reader.shape, run.engine.module.output.out_features)


def _label_bytes(run: Run) -> np.ndarray | None:
    """Bytes that each label stands for, where some are not chars."""
    return run.tokenizer.byte_lengths if run.config.model.writes == "tokens" else None


def _leave_out_bad_shards(run: Run, taken: Step | UserError | None, state: RunState) -> None:
    """Agree with the other ranks on the shards that one of them cannot read; all read the step again, without them.

    Raises:
        UserError: the run must stop, on all ranks; what it has learnt is saved.
    """
    rows = state.step * run.rows_per_step
    problems = ds.gather_objects(taken if isinstance(taken, UserError) else None)
    try:
        record = record_of_bad_shards(problems, state.record, rows, run.config.data)
    except UserError:
        run.saver.save_last(state)
        raise
    ds.from_first_rank(lambda: record.write(run.folder))
    for shard in set(record.shards) - set(state.record.shards):
        run.monitor.line(f"step {state.step + 1}: left out {shard.name} from row {shard.from_row} on: {shard.reason}")
    run.monitor.line(f"{QUARANTINE} holds {len(record.shards)} shards; a replay leaves out the same rows")
    state.record = record
    run.data.leave_out(record)
    seek(run.data.stream, state, run.rows_per_step)


def _validate(run: Run, state: RunState, early_stop: EarlyStop) -> None:
    """Loss, bits per byte and generation on the held-out split; nothing where nothing is held out."""
    engine, tokenizer, data, monitor, step = run.engine, run.tokenizer, run.data, run.monitor, state.step
    state.metrics = {}  # so that a validation that is cut off is known to be owed
    if run.rank == 0:
        monitor.histograms(step, "weights", samples(owned_weights(engine)))
    if data.pictured is None:
        return
    engine.eval()
    any_rank = run.watch.meeting.any_rank
    loss, bits = validation_loss(engine, data.validation, any_rank, _label_bytes(run))
    outcomes: list[Outcome] = []
    matches, pictures = {}, {}
    if not run.config.model.is_baseline:
        outcomes = validation_generation(engine.module, tokenizer, data.tasks, (run.rank, run.world), any_rank)
        if run.config.monitor.pictures:
            pictures = validation_pictures(engine.module, tokenizer, data.pictured, draws=run.rank == 0)
    elif any(task.kind == "answer" for task in data.tasks):
        matches = validation_match(engine, data.validation, any_rank)
    engine.train()
    metrics = {"validation/loss": loss, "validation/bits_per_byte": bits} | generation_metrics(outcomes) | matches
    monitor.scalars(step, metrics | run.attention_share)
    examples = [outcome.example for outcome in outcomes if outcome.example is not None]
    monitor.generations(step, examples, as_markdown(examples))
    for name, png in pictures.items():
        monitor.image(step, name, png)
    monitor.line(f"step {step}: " + " ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
    early_stop.judge(step, metrics)
    state.metrics, state.early_stop = metrics, early_stop.state
    state.texts = Texts(step, [outcome.text for outcome in outcomes if outcome.text is not None])
