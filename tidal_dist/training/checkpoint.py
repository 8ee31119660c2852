"""Checkpoints: DeepSpeed's files with the training state beside them, whole or not at all.

A checkpoint is the folder `checkpoints/step-NNNNNNNN`; it takes that name when it is complete. `state.json` in it
says where training stood; `best.json` beside the folders names the best one.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from data_pipeline.files import replace_file
from tidal_dist.errors import CheckpointError

STATE, PROBE, CONFIG, TOKENIZER, BEST = "state.json", "probe.safetensors", "config.yaml", "tokenizer.json", "best.json"
_STEP_FOLDER = re.compile(r"step-(\d{8})$")


@dataclass(frozen=True)
class TrainingState:
    """Where training stands, beside weights and optimizer.

    Attributes:
        step: optimizer steps made. rows: rows consumed. rolling_hash: over the consumed rows' identities.
        world: ranks that wrote the checkpoint. order_hash: of everything the order of rows depends on.
        manifest_hash, tokenizer_hash, segmentation_hash: what it was trained with.
        precision: "fp32" or "bf16", of weights and activations in training.
        probe_loss: nats per label of the probe batch, with these weights in this precision.
        metrics: the last validation's figures. train_seconds: spent in training so far.
    """

    step: int
    rows: int
    rolling_hash: str
    world: int
    order_hash: str
    manifest_hash: str
    tokenizer_hash: str
    segmentation_hash: str
    precision: Literal["fp32", "bf16"]
    probe_loss: float
    metrics: dict[str, float]
    train_seconds: float


def save_checkpoint(
    engine: Any, folder: Path, state: TrainingState, products: dict[str, bytes], is_best: bool, keep: int
) -> None:
    """Write a checkpoint from all ranks and remove those no longer kept.

    Args:
        products: further files by name: probe batch, configuration, tokeniser.
        is_best: mark it as the best so far.
        keep: newest checkpoints to keep, beside the best.
    """
    final = folder / f"step-{state.step:08d}"
    partial = folder / f".{final.name}.partial"
    is_first = dist.get_rank() == 0
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False)
    if is_first:
        for name, data in products.items():
            replace_file(partial / name, data)
        replace_file(partial / STATE, json.dumps(asdict(state), indent=1).encode())
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        if is_best:
            replace_file(folder / BEST, json.dumps({"checkpoint": final.name, "metrics": state.metrics}).encode())
        _remove_old(folder, keep)
    dist.barrier()


def _remove_old(folder: Path, keep: int) -> None:
    best = best_checkpoint(folder)
    for old in complete_checkpoints(folder)[:-keep]:
        if old != best:
            shutil.rmtree(old)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = [p for p in folder.glob("step-*") if _STEP_FOLDER.search(p.name) and (p / STATE).is_file()]
    return sorted(found, key=lambda p: p.name)


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint marked as best, if it is there."""
    try:
        path = folder / json.loads((folder / BEST).read_bytes())["checkpoint"]
    except (OSError, ValueError, KeyError):
        return None
    return path if (path / STATE).is_file() else None


def best_metrics(folder: Path) -> dict[str, float]:
    """The metrics of the checkpoint marked as best; {} where there is none."""
    best = best_checkpoint(folder)
    return load_state(best).metrics if best else {}


def load_state(checkpoint: Path) -> TrainingState:
    """The training state of a checkpoint.

    Raises:
        CheckpointError: it has none, or it cannot be read.
    """
    try:
        return TrainingState(**json.loads((checkpoint / STATE).read_bytes()))
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint}: no {STATE}, so this is no complete checkpoint") from None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / STATE}: cannot read ({error}); use an older checkpoint") from None


def load_checkpoint(engine: Any, checkpoint: Path, expected: dict[str, Any]) -> TrainingState:
    """Load weights and optimizer on all ranks; the training state.

    Args:
        expected: fields of the state that must agree with this run, with what each is called in an error.

    Raises:
        CheckpointError: the checkpoint belongs to another run or number of ranks.
    """
    state = load_state(checkpoint)
    for name, value in expected.items():
        if getattr(state, name) != value:
            raise CheckpointError(
                f"{checkpoint}: its {name.replace('_', ' ')} is {getattr(state, name)}, this run's is {value}; "
                "resume with what the checkpoint was trained with, or start in another run_dir"
            )
    path, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_lr_scheduler_states=False)
    if path is None:
        raise CheckpointError(f"{checkpoint}: DeepSpeed could not load it; use an older checkpoint")
    return state
