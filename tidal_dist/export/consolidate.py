"""A training checkpoint of any number of ranks -> one exported folder."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tidal_dist.config import ModelConfig, load_config
from tidal_dist.errors import CheckpointError
from tidal_dist.export.package import PROBE, TEXTS, TOKENIZER, TRAINING
from tidal_dist.export.weights import UNIVERSAL, Weights, averaged, stored_weights
from tidal_dist.export.write import LARGEST_FILE, Product, write_export
from tidal_dist.training import checkpoint as ckpt
from tidal_dist.training.commit import COMMIT, best_checkpoint, complete_checkpoints, content_problem, step_of

AVERAGE = "ema"
_MOST_HASHERS = 8


@dataclass(frozen=True)
class Choice:
    """What is exported of a run, and how.

    Attributes:
        which: the "best" checkpoint, the "last", that of a step, or "ema": their average with `decay`.
        dtype: fp32, bf16 or fp16. max_file_bytes: of a file of weights.
    """

    which: str = "best"
    decay: float = 0.9
    dtype: str = "fp32"
    max_file_bytes: int = LARGEST_FILE


def find_checkpoint(path: Path, which: str) -> Path:
    """The checkpoint that `path` names: itself, or of a run the "best", the "last" or that of a step.

    Raises:
        CheckpointError: there is none.
    """
    if (path / ckpt.STATE).is_file():
        return path
    if (path / UNIVERSAL).is_dir():
        names = f"{ckpt.STATE}, {ckpt.CONFIG}, {ckpt.TOKENIZER} and {ckpt.PROBE}"
        raise CheckpointError(
            f"{path}: a universal checkpoint without {ckpt.STATE}; copy {names} into it from the checkpoint that it "
            "was made of"
        )
    complete = _checkpoints(path)
    folder = path / "checkpoints"
    if which == "last":
        return complete[-1]
    if which == "best":
        return best_checkpoint(folder) or complete[-1]
    steps = {str(step_of(p)): p for p in complete}
    if which not in steps:
        raise CheckpointError(f"{folder}: no checkpoint of step {which}; there are {', '.join(steps)}")
    return steps[which]


def _checkpoints(run: Path) -> list[Path]:
    complete = complete_checkpoints(run / "checkpoints")
    if not complete:
        raise CheckpointError(f"{run}: neither a checkpoint nor a run with a complete one in {run / 'checkpoints'}")
    return complete


def export(path: Path, out: Path, choice: Choice | str = Choice()) -> dict[str, Any]:
    """Export a checkpoint, or the average of a run's; a report of what was written and proven.

    Args:
        choice: a string is the checkpoint, everything else as it comes.

    Raises:
        CheckpointError: there is no checkpoint, or it is not what was written.
        ExportError: the export is not the model that was trained, or `out` is there.
        UserError: the disk refuses.
    """
    choice = Choice(choice) if isinstance(choice, str) else choice
    if choice.which == AVERAGE and (path / ckpt.STATE).is_file():
        raise CheckpointError(f"{path}: one checkpoint, which has no average; give its run, or leave --which ema out")
    checkpoints = _checkpoints(path) if choice.which == AVERAGE else [find_checkpoint(path, choice.which)]
    newest = checkpoints[-1]
    states = [ckpt.load_state(checkpoint) for checkpoint in checkpoints]
    config, made = load_config(newest / ckpt.CONFIG), states[-1].provenance
    check_is_no_baseline(newest, config.model)
    weights = [_checked_weights(*pair) for pair in zip(checkpoints, states, strict=True)]
    files = {TOKENIZER: newest / ckpt.TOKENIZER, PROBE: newest / ckpt.PROBE, TRAINING: newest / ckpt.CONFIG}
    if (newest / ckpt.TEXTS).is_file():
        files[TEXTS] = newest / ckpt.TEXTS
    proof = write_export(
        out,
        Product(
            averaged(weights, choice.decay) if choice.which == AVERAGE else weights[0],
            config.model,
            config.segmentation,
            files,
            made,
            _origin(checkpoints, states, choice),
            choice.which == AVERAGE,
            choice.dtype,
            choice.max_file_bytes,
        ),
    )
    return {
        "export": str(out),
        "checkpoint": str(newest),
        "averaged": [step_of(checkpoint) for checkpoint in checkpoints] if choice.which == AVERAGE else None,
        "step": made.step,
        "dtype": choice.dtype,
        "parameters": proof.parameters,
        "probe_loss_checkpoint": made.probe_loss,
        "probe_loss_export": proof.probe_loss,
        "texts": proof.texts,
        "proof": proof.lines(),
    }


def check_is_no_baseline(checkpoint: Path, model: ModelConfig) -> None:
    """Check that generation knows the model of a checkpoint.

    Raises:
        CheckpointError: it is one to compare with.
    """
    if model.is_baseline:
        what = f"model.writes: {model.writes}" if model.writes != "blocks" else f"model.char_order: {model.char_order}"
        raise CheckpointError(
            f"{checkpoint}: a baseline ({what}), which is trained and measured only (`python -m experiments`); "
            "export or examine a model that writes blocks from their end"
        )


def consolidated_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All weights in float32 in memory, put together from the ranks' partitions.

    Raises:
        CheckpointError: files are missing or not what was written.
    """
    weights = _checked_weights(checkpoint, ckpt.load_state(checkpoint))
    return {name: weights.whole(name) for name in weights.shapes}


def _checked_weights(checkpoint: Path, state: ckpt.TrainingState) -> Weights:
    """The weights of a checkpoint whose files are those that were written.

    A universal checkpoint has no hashes of its files; the digests of the weights speak for it.
    """
    if (checkpoint / COMMIT).is_file() or not (checkpoint / UNIVERSAL).is_dir():
        count = min(_MOST_HASHERS, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(count) as hashers:
            problems = hashers.map(lambda i: content_problem(checkpoint, (i, count)), range(count))
            if problem := next(filter(None, problems), None):
                raise CheckpointError(f"{checkpoint}: {problem}; use another checkpoint")
    return stored_weights(checkpoint, state)


def _origin(checkpoints: Sequence[Path], states: Sequence[ckpt.TrainingState], choice: Choice) -> dict[str, Any]:
    newest, state = checkpoints[-1], states[-1]
    origin: dict[str, Any] = {
        "checkpoint": newest.name,
        "which": choice.which,
        "ranks": state.ranks,
        "zero_stage": state.layout.get("zero_optimization", {}).get("stage"),
        "train_seconds": state.train_seconds,
    }
    if (newest / COMMIT).is_file():
        origin["commit_sha256"] = hashlib.sha256((newest / COMMIT).read_bytes()).hexdigest()
    origin |= {name: state.extra[name] for name in ("coverage", "corpus") if name in state.extra}
    if choice.which == AVERAGE:
        steps = [found.provenance.step for found in states]
        origin["average"] = {"decay": choice.decay, "steps": steps}
    return origin
