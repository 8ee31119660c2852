"""What a run does about a bad step: it names the rows, leaves them out, goes back to a checkpoint, or ends.

What was left out is recorded, and all else follows from the record: a run that reads it, resumed or from its first
step, makes the same steps. Every rank comes to the same decisions; rank 0 writes.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from data_pipeline.errors import UserError
from data_pipeline.files import replace_file
from data_pipeline.layout import IGNORED
from data_pipeline.ordering import roll, rows_of_rank
from data_pipeline.quarantine import LeftOutRows, QuarantineRecord
from data_pipeline.stream import Batch
from tidal_dist.errors import GuardError
from tidal_dist.history.events import read_events
from tidal_dist.training import checkpoint as ckpt
from tidal_dist.training import engine as ds
from tidal_dist.training.commit import complete_checkpoints, discard_after, step_of
from tidal_dist.training.guard import BadStep
from tidal_dist.training.run import Run
from tidal_dist.training.state import RunState

REPORT = "guard.json"
_NAMED, _NAMED_OF_FINITE = 8, 3


@dataclass(frozen=True)
class NamedRow:
    """A row that may be why a step is bad: its number in the run, its loss in evaluation, its documents."""

    row: int
    nats_per_label: float
    documents: list[str]


def leave_out_step(run: Run, state: RunState, batches: list[Batch], bad: BadStep) -> None:
    """Name and leave out the rows of the step after `state.step`, which was passed and discarded.

    Raises:
        GuardError: the configuration says that the run ends then.
    """
    rows = range(state.step * run.rows_per_step, (state.step + 1) * run.rows_per_step)
    step = state.step + 1
    named = _name_rows(run, state.step, batches)
    run.events.add(
        "bad_step",
        step,
        why=bad.why,
        loss=_readable(bad.loss),
        gradient_norm=_readable(bad.gradient_norm),
        rows=[rows.start, rows.stop],
        named=[asdict(row) | {"nats_per_label": _readable(row.nats_per_label)} for row in named],
    )
    stops = run.config.guard.on_bad_step == "stop"
    text = f"{bad.why}; rows {rows.start}..{rows.stop - 1} {'hold it' if stops else 'are left out'}"
    run.monitor.line("\n  ".join([f"step {step}: {text}", *map(_as_text, named)]))
    run.monitor.text(step, "guard/bad_step", "\n".join([text, "", *(f"- {_as_text(row)}" for row in named)]))
    if stops:
        raise _ended(run, state, f"step {step}: {bad.why}, and guard.on_bad_step=stop")
    state.record = state.record.with_rows(LeftOutRows(rows.start, rows.stop, f"step {step}: {bad.why}"))
    ds.from_first_rank(lambda: state.record.write(run.folder))
    run.data.stream.was_empty(state.record.empty_rows())
    if run.rank == 0:
        state.rolling_hash = roll(state.rolling_hash, run.data.stream.order, rows)


def must_go_back(run: Run, state: RunState) -> bool:
    """Whether the last steps were bad, as many in a row as the run puts up with."""
    bad_rows = state.record.bad_rows_before(state.step * run.rows_per_step)
    return bad_rows >= run.config.guard.max_skipped_in_a_row * run.rows_per_step


def go_back(run: Run, state: RunState) -> RunState:
    """Load a checkpoint from before the bad steps and leave out all rows from there to here: where the run goes on.

    That is what PaLM's authors did by hand (Chowdhery et al. 2022, section 5.1): start again from before the spike and
    skip the data around it. The checkpoint is one from before the last step that was made, if there is one: no
    weights have changed since then.

    Raises:
        GuardError: there is no checkpoint, or the run went back too often.
    """
    rows = state.step * run.rows_per_step
    bad_steps = state.record.bad_rows_before(rows) // run.rows_per_step
    why = f"{bad_steps} bad steps in a row, the last one {state.record.why_empty(rows - 1)}"
    folder = run.folder / "checkpoints"
    run.saver.wait()
    checkpoint = ds.from_first_rank(lambda: checkpoint_before(folder, state.step - bad_steps))
    if checkpoint is None:
        raise _ended(run, state, f"{why}, and no checkpoint to go back to")
    if state.record.rollbacks >= run.config.guard.max_rollbacks:
        times = "once" if state.record.rollbacks == 1 else f"{state.record.rollbacks} times"
        limit = f"guard.max_rollbacks={run.config.guard.max_rollbacks}"
        raise _ended(run, state, f"{why}, and the run went back {times} already ({limit})")
    start = ckpt.load_state(checkpoint).provenance
    record = state.record.with_rows(LeftOutRows(start.rows, rows, f"{why}; back to {checkpoint.name}", rollbacks=1))
    ds.from_first_rank(lambda: _commit(run.folder, start.step, record))
    run.monitor.line(f"step {state.step}: {why}; back to {checkpoint.name}, without rows {start.rows}..{rows - 1}")
    run.events.add("rollback", state.step, why=why, checkpoint=checkpoint.name, rows=[start.rows, rows])
    run.data.leave_out(record)
    return run.saver.load(checkpoint, record)


def checkpoint_before(folder: Path, step: int) -> Path | None:
    """The newest checkpoint from before a step, else the newest one."""
    found = complete_checkpoints(folder)
    before = [path for path in found if step_of(path) < step]
    return next(reversed(before or found), None)


def _commit(run: Path, step: int, record: QuarantineRecord) -> None:
    # In this order: of a run that ends in between, the checkpoints fit the record, and it goes back when it resumes.
    discard_after(run / "checkpoints", step)
    record.write(run)


def _name_rows(run: Run, step: int, batches: list[Batch]) -> list[NamedRow]:
    """The worst rows of the step after `step`; every rank looks at its own."""
    own = rows_of_rank(step, run.rows_per_step, run.rank, run.world)
    worst = sorted(zip(_row_losses(run.engine, batches), own, strict=True), key=_badness)[:_NAMED]
    mine = [NamedRow(g, loss, _documents(run, g)) for loss, g in worst]
    return worst_rows([row for part in ds.gather_objects(mine) for row in part])


def worst_rows(rows: list[NamedRow]) -> list[NamedRow]:
    """Those whose own loss is not finite; where there are none, those of the largest loss."""
    rows = sorted(rows, key=lambda row: _badness((row.nats_per_label, row.row)))
    not_finite = [row for row in rows if not math.isfinite(row.nats_per_label)]
    return not_finite[:_NAMED] or rows[:_NAMED_OF_FINITE]


def _badness(loss_and_row: tuple[float, int]) -> tuple[bool, float, int]:
    loss, g = loss_and_row
    return (True, -loss, g) if math.isfinite(loss) else (False, 0.0, g)


@torch.no_grad()
def _row_losses(engine: Any, batches: list[Batch]) -> list[float]:
    """Nats per label of every row of this rank, in evaluation; all ranks pass equally many batches."""
    losses: list[float] = []
    engine.eval()
    for batch in batches:
        batch = batch.to(ds.device())
        logits = engine(batch.tokens, batch.chars)
        nats = F.cross_entropy(logits.float().transpose(1, 2), batch.labels, ignore_index=IGNORED, reduction="none")
        labels = (batch.labels != IGNORED).sum(1).clamp(min=1)
        losses += (nats.sum(1) / labels).tolist()
    engine.train()
    return losses


def _documents(run: Run, g: int) -> list[str]:
    """The documents in row `g`, and where they come from."""
    address = run.data.stream.order.locate(g)
    if address.quarantined:
        return []
    try:
        return [document for document, _ in run.data.reader.documents(address)]
    except UserError as error:
        # The row was read a moment ago; on one rank alone this must not end the run.
        return [f"cannot be read any more: {error}"]


def _ended(run: Run, state: RunState, why: str) -> GuardError:
    """The error that ends the run; its report is written."""
    tries = [
        "look at the documents of the rows that are named, with `tidal explain --run RUN --step STEP`",
        "lower training.learning_rate, or lengthen training.warmup_steps, if weights or gradients grow before it",
        "raise guard.spike_factor if the gradient norms before it are as they should be",
        "raise guard.max_skipped_in_a_row or guard.max_rollbacks to have more rows left out; then resume",
    ]
    run.events.add("stop", state.step, reason=why)

    def write() -> None:
        events = [event for event in read_events(run.folder) if event["event"] in ("bad_step", "rollback")]
        left_out = [asdict(rows) for rows in state.record.rows]
        report = {"format": 1, "step": state.step, "why": why, "left_out": left_out, "events": events, "try": tries}
        replace_file(run.folder / REPORT, json.dumps(report, indent=1, ensure_ascii=False).encode())

    ds.from_first_rank(write)
    return GuardError(f"{why}; see {run.folder / REPORT} for rows, documents and what to try")


def _as_text(row: NamedRow) -> str:
    documents = "; ".join(row.documents[:4]) + (f"; {len(row.documents) - 4} more" if len(row.documents) > 4 else "")
    return f"row {row.row} ({row.nats_per_label:.4g} nats per label): {documents or 'no documents'}"


def _readable(value: float) -> float | str:
    """A number as strict JSON has it, or its name where that has none."""
    return value if math.isfinite(value) else str(value)
