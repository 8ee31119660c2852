"""Checkpoints: DeepSpeed's files with the training state beside them, whole or not at all.

A checkpoint is the folder `checkpoints/step-NNNNNNNN`; it takes that name when it is complete. `state.json` in it
says where training stood; `best.json` beside the folders names the best one.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_pipeline.files import replace_file
from tidal_dist.errors import CheckpointError
from tidal_dist.provenance import Provenance

STATE, PROBE, CONFIG, TOKENIZER, BEST = "state.json", "probe.safetensors", "config.yaml", "tokenizer.json", "best.json"
_STEP_FOLDER = re.compile(r"step-(\d{8})$")


@dataclass(frozen=True)
class TrainingState:
    """Where training stands, beside weights and optimizer.

    Attributes:
        provenance: of the weights. ranks: how many wrote the checkpoint.
        order_hash: of everything that the order of the rows depends on. train_seconds: spent in training so far.
    """

    provenance: Provenance
    ranks: int
    order_hash: str
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
    final = folder / f"step-{state.provenance.step:08d}"
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
            best = {"checkpoint": final.name, "metrics": state.provenance.metrics}
            replace_file(folder / BEST, json.dumps(best).encode())
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
    return load_state(best).provenance.metrics if best else {}


def load_state(checkpoint: Path) -> TrainingState:
    """The training state of a checkpoint.

    Raises:
        CheckpointError: it has none, or it cannot be read.
    """
    try:
        content = json.loads((checkpoint / STATE).read_bytes())
        return TrainingState(**content | {"provenance": Provenance(**content["provenance"])})
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint}: no {STATE}, so this is no complete checkpoint") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{checkpoint / STATE}: cannot read ({error}); use an older checkpoint") from None


def load_checkpoint(engine: Any, checkpoint: Path, expected: dict[str, Any]) -> TrainingState:
    """Load weights and optimizer on all ranks; the training state.

    Args:
        expected: fields of the state or its provenance that must agree with this run.

    Raises:
        CheckpointError: the checkpoint belongs to another run or number of ranks.
    """
    state = load_state(checkpoint)
    found = vars(state.provenance) | vars(state)
    for name, value in expected.items():
        if found[name] != value:
            raise CheckpointError(
                f"{checkpoint}: {name.replace('_', ' ')} {found[name]} there, {value} in this run; "
                "resume with what the checkpoint was trained with, or start in another run_dir"
            )
    path, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_lr_scheduler_states=False)
    if path is None:
        raise CheckpointError(f"{checkpoint}: DeepSpeed could not load it; use an older checkpoint")
    return state
