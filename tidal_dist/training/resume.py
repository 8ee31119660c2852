"""Which checkpoint a run goes on from, and the proof that what was loaded is what was saved."""

import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from data_pipeline.stream import Batch
from tidal_dist.config import Config
from tidal_dist.errors import CheckpointError
from tidal_dist.provenance import PROBE_TOLERANCE, probe_loss
from tidal_dist.training import checkpoint as ckpt
from tidal_dist.training import engine as ds
from tidal_dist.training.commit import Skipped, content_problem, resumable
from tidal_dist.training.digest import Digest, added, partial_digest
from tidal_dist.training.elastic import load_other_layout
from tidal_dist.training.slices import owned_slices, shapes, step_count

# What may be changed between two parts of a training: it alters neither the shape nor the meaning of the weights.
_MAY_CHANGE = {"dropout", "place_shift"}
_OF_THE_STATE = {"params", "step"}  # of an optimizer's group: not settings


def find_checkpoint(folder: Path, share: tuple[int, int]) -> tuple[Path, list[Skipped]]:
    """The newest checkpoint in a folder that is whole, and those that were skipped; the same on all ranks.

    Args:
        share: (rank, ranks): every rank hashes its share of the files.

    Raises:
        CheckpointError: none is.
    """
    found, skipped = ds.from_first_rank(lambda: resumable(folder))
    for checkpoint in found:
        problems = ds.gather_objects(content_problem(checkpoint, share))
        problem = next((text for text in problems if text is not None), None)
        if problem is None:
            # A checkpoint older than the one taken is of no interest.
            return checkpoint, [skip for skip in skipped if skip.checkpoint > checkpoint.name]
        skipped.append(Skipped(checkpoint.name, problem))
    if skipped:
        reasons = "; ".join(f"{skip.checkpoint}: {skip.reason}" for skip in skipped)
        raise CheckpointError(f"{folder}: no checkpoint is whole ({reasons}); restore one, or start in another run_dir")
    raise CheckpointError(f"{folder}: no complete checkpoint to resume from; start without --resume")


def load_weights(
    engine: Any, checkpoint: Path, state: ckpt.TrainingState, config: Config, layout: dict[str, Any], probe: Batch
) -> dict[str, Any]:
    """Load weights and optimizer on all ranks, from the layout that they were saved in, and prove them equal.

    Args:
        layout: of this run. probe: the batch whose loss the checkpoint stores.

    Returns:
        How they were loaded.

    Raises:
        CheckpointError: it is another model's checkpoint, or what was loaded is not what was saved.
    """
    started = time.monotonic()
    check_model(checkpoint, config)
    check_shapes(checkpoint, state, engine)
    settings = [{k: v for k, v in g.items() if k not in _OF_THE_STATE} for g in engine.optimizer.param_groups]
    is_same = state.layout == layout
    if is_same:
        ckpt.load_same_layout(engine, checkpoint)
    else:
        load_other_layout(engine, checkpoint, state, dist.get_rank() == 0)
    for group, setting in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(setting)  # the run's configuration holds, whatever the checkpoint was trained with
    loaded = time.monotonic()
    check_loaded(checkpoint, state, engine)
    difference = check_probe(checkpoint, state, probe_loss(engine, probe, ds.device()))
    return {
        "checkpoint": checkpoint.name,
        "ranks": dist.get_world_size(),
        "saved_by_ranks": state.ranks,
        "converted": not is_same,
        "probe_loss_difference": difference,
        "load_seconds": round(loaded - started, 3),
        "verify_seconds": round(time.monotonic() - loaded, 3),
    }


def check_model(checkpoint: Path, config: Config) -> None:
    """Check that the checkpoint's model is this run's.

    Raises:
        CheckpointError: it is another one; all differences in one line.
    """
    try:
        theirs = yaml.safe_load((checkpoint / ckpt.CONFIG).read_text("utf-8"))["model"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / ckpt.CONFIG}: cannot read ({error}); use an older checkpoint") from None
    ours = config.model.model_dump()
    differences = [
        f"model.{name} {theirs[name]} there, {ours[name]} in this run"
        for name in ours
        if name in theirs and name not in _MAY_CHANGE and theirs[name] != ours[name]
    ]
    if differences:
        raise CheckpointError(
            f"{checkpoint}: holds another model: {'; '.join(differences)}; "
            "resume with the model that it holds, or start in another run_dir"
        )


def check_shapes(checkpoint: Path, state: ckpt.TrainingState, engine: Any) -> None:
    """Check that the checkpoint has the parameters of the engine's model.

    Raises:
        CheckpointError: one is missing, unexpected or of another shape.
    """
    ours = shapes(engine)
    theirs = {name: parameter["shape"] for name, parameter in state.parameters.items()}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            there, here = (found.get(name, "none") for found in (theirs, ours))
            raise CheckpointError(f"{checkpoint}: holds another model: {name} {there} there, {here} in this run")


def check_loaded(checkpoint: Path, state: ckpt.TrainingState, engine: Any) -> None:
    """Check that weights, moments and the optimizer's count of steps are bit for bit what was saved; on all ranks.

    Raises:
        CheckpointError: they are not.
    """
    steps = step_count(engine)
    if steps != state.optimizer_steps:
        raise CheckpointError(
            f"{checkpoint}: the optimizer counts {steps:.0f} steps after loading, {state.optimizer_steps:.0f} were "
            "saved; use an older checkpoint"
        )
    for name, digest in digests_of(engine).items():
        for what, found, saved in zip(Digest._fields, digest, state.parameters[name]["digest"], strict=True):
            if found != saved:
                raise CheckpointError(
                    f"{checkpoint}: {what.replace('weight', 'the weight')} of {name} is not what was saved; "
                    "use an older checkpoint"
                )


def digests_of(engine: Any) -> dict[str, Digest]:
    """The digests of all parameters, the same on all ranks, whatever their number."""
    return added(ds.gather_objects(_own_digests(engine)))


def _own_digests(engine: Any) -> dict[str, list[int]]:
    own = {}
    for part in owned_slices(engine):
        if part.is_counted:
            sums = [int(partial_digest(tensor, part.start)) for tensor in part.tensors]
            own[part.name] = sums + [0] * (len(Digest._fields) - len(sums))
    return own


def check_probe(checkpoint: Path, state: ckpt.TrainingState, loss: float) -> float:
    """Check that the loaded weights repeat the loss of the probe batch; by how much they miss it, in nats a label.

    Their bits are checked already, so this is about the model that computes with them. On other kernels, or with
    another number of threads, sums come in another order.

    Raises:
        CheckpointError: they do not.
    """
    made = state.provenance
    if not abs(loss - made.probe_loss) <= PROBE_TOLERANCE[made.precision] * max(1.0, abs(made.probe_loss)):
        raise CheckpointError(
            f"{checkpoint}: the probe batch's loss is {loss:.6f} here, {made.probe_loss:.6f} was saved; "
            "resume with the program and configuration that saved it"
        )
    return loss - made.probe_loss
