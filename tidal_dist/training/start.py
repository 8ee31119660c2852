"""A training from its configuration to its end: everything is opened, then the loop runs."""

import sys
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import torch

from data_pipeline.files import replace_file
from data_pipeline.quarantine import QuarantineRecord
from data_pipeline.rows import has_row_plan, row_format_of, write_row_plan
from data_pipeline.segmentation import segmentation_hash
from data_pipeline.shards import Manifest
from data_pipeline.tokenizer import MixedTokenizer
from tidal_dist.config import Config
from tidal_dist.errors import CheckpointError, ConfigError
from tidal_dist.history.events import Events
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.training import engine as ds
from tidal_dist.training import run_lock
from tidal_dist.training.collectives import last_collective
from tidal_dist.training.commit import complete_checkpoints
from tidal_dist.training.data import RunData, open_data
from tidal_dist.training.early_stop import EarlyStop, check_early_stop
from tidal_dist.training.interrupts import Interrupts, Stopped
from tidal_dist.training.loop import run_steps, seek
from tidal_dist.training.monitor import Monitor
from tidal_dist.training.resume import find_checkpoint
from tidal_dist.training.run import Run
from tidal_dist.training.state import RunState, Saver
from tidal_dist.training.stopping import stop, stop_at_start
from tidal_dist.training.telling import tell_saves, tell_start
from tidal_dist.training.watch import Watch


def train(config: Config, resume: bool = False, interrupts: Interrupts | None = None) -> None:
    """Train as configured, on all ranks of the launcher, to the end or until one of them is asked to stop.

    Raises:
        UserError: configuration, shards or checkpoint do not fit, or another job is at the run.
        LostRanks: another rank has ended, hangs or cannot be reached.
    """
    manifest = Manifest.of(config.data)
    tokenizer = manifest.tokenizer()
    _check_segmentation(config, manifest)
    folder, interrupts = Path(config.run_dir), interrupts or Interrupts()
    with (
        Watch(config, interrupts, ds.synchronize, ds.agree, last_collective) as watch,
        ds.process_group(config.training, folder) as share,
        ExitStack() as stack,
    ):
        ds.from_first_rank(lambda: stack.enter_context(run_lock.held(folder)))
        watch.heartbeat.begin()
        try:
            _train(config, resume, manifest, tokenizer, share, watch)
        except Stopped:
            if not watch.stopped:
                stop_at_start(watch, folder, share[0])


def _train(
    config: Config,
    resume: bool,
    manifest: Manifest,
    tokenizer: MixedTokenizer,
    share: tuple[int, int],
    watch: Watch,
) -> None:
    folder, (rank, world) = Path(config.run_dir), share
    watch.startup.done("join")
    ds.from_first_rank(lambda: _make_ready(config, resume, manifest))
    newest, skipped = find_checkpoint(folder / "checkpoints", share) if resume else (None, [])
    record = ds.from_first_rank(lambda: QuarantineRecord.load(folder, manifest.hash))
    data = ds.together(lambda: _open_data(config, manifest, tokenizer, record, share))
    watch.meeting.any_rank()
    watch.startup.done("shards")
    engine = ds.build_engine(config, world, lambda: _build_model(config, tokenizer))
    watch.meeting.any_rank()
    watch.startup.done("engine")
    saver = Saver(config, manifest, data, engine, world)
    state = saver.load(newest, record) if newest else RunState(0, data.start, record)
    if ended := _why_ended(config, state):
        if rank == 0:
            print(f"{folder}: {ended}", file=sys.stderr, flush=True)
        return
    if rank == 0:
        replace_file(folder / "config.yaml", config.to_yaml().encode())
    watch.startup.done("load")
    events = Events(folder, writes=rank == 0)
    outcome: RunState | str = state
    while isinstance(outcome, RunState):
        # Where a run goes back to a checkpoint, all is opened again as it is when a run resumes.
        state = outcome
        seek(data.stream, state, config.training.batch_rows)
        with closing(ds.together(partial(Monitor, folder, rank, state.step, config.training.steps))) as monitor:
            run = Run(config, tokenizer, data, engine, saver, monitor, events, watch, rank, world)
            parameters, steps = f"{_parameters(engine.module):,} parameters", config.training.steps
            monitor.line(f"{world} ranks, {parameters}, from step {state.step} of {steps}")
            tell_start(run, state.step, skipped)
            skipped = []
            outcome = _run_to_an_end(run, state)
    events.add("finish", state.step, reason=outcome)


def _run_to_an_end(run: Run, state: RunState) -> RunState | str:
    """Run the steps; at their end, or where the run is asked to stop, the last checkpoint is on the disk.

    Raises:
        Stopped: the run was asked to stop. UserError: it must, or the last checkpoint cannot be written.
    """
    try:
        outcome = run_steps(run, state)
        if isinstance(outcome, str):
            with run.watch.phases("checkpoint"):
                run.saver.save_last(state)
            run.monitor.line(f"finished after step {state.step}: {outcome}")
        return outcome
    except Stopped:
        stop(run, state)
        raise
    finally:
        tell_saves(run)


def _open_data(
    config: Config, manifest: Manifest, tokenizer: MixedTokenizer, record: QuarantineRecord, share: tuple[int, int]
) -> RunData:
    data = open_data(config, manifest, tokenizer, record, share, ds.uses_pinned_memory())
    check_early_stop(config.validation, data.pictured is not None, any(task.kind == "answer" for task in data.tasks))
    return data


def _build_model(config: Config, tokenizer: MixedTokenizer) -> TidalTransformer:
    sizes = tokenizer.vocab_size, tokenizer.segmentation.max_block_bytes
    again = ds.activation_checkpoint(config.training), config.training.activation_checkpoint_every_layers
    return TidalTransformer(config.model, *sizes, *again, config.training.attention)


def _make_ready(config: Config, resume: bool, manifest: Manifest) -> None:
    """Make the row plan where there is none.

    Raises:
        UserError: there are checkpoints that must not be overwritten, or rows cannot be planned.
    """
    row_format = row_format_of(config.data)
    if not has_row_plan(manifest, row_format):
        write_row_plan(manifest, row_format)
    checkpoints = Path(config.run_dir) / "checkpoints"
    if not resume and complete_checkpoints(checkpoints):
        raise CheckpointError(f"{checkpoints}: holds checkpoints of an earlier run; give --resume or another run_dir")


def _why_ended(config: Config, state: RunState) -> str:
    """Why a run that is resumed has nothing left to do, and how it would go on; "" if it has."""
    if state.step >= config.training.steps:
        return f"all {state.step:,} steps are made; to train on, raise training.steps"
    reason = EarlyStop.resumed(config.validation, state.early_stop).reason
    return f"ended early: {reason}; to train on, raise validation.early_stop_patience" if reason else ""


def _check_segmentation(config: Config, manifest: Manifest) -> None:
    if segmentation_hash(config.segmentation) != manifest.content["segmentation_hash"]:
        raise ConfigError(
            f"{manifest.where}: the shards were made with another segmentation ({manifest.content['segmentation']}) "
            "than the configuration's; prepare the shards anew or set segmentation.* as they have it"
        )


def _parameters(model: torch.nn.Module) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
