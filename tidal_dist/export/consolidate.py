"""A training checkpoint of any number of ranks -> one exported folder."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch

from tidal_dist.config import load_config
from tidal_dist.errors import CheckpointError
from tidal_dist.export.package import PROBE, TOKENIZER, TRAINING, write_export
from tidal_dist.training import checkpoint as ckpt
from tidal_dist.training.commit import best_checkpoint, complete_checkpoints, content_problem, step_of


def find_checkpoint(path: Path, which: str) -> Path:
    """The checkpoint that `path` names: itself, or of a run the "best", the "last" or that of a step.

    Raises:
        CheckpointError: there is none.
    """
    if (path / ckpt.STATE).is_file():
        return path
    folder = path / "checkpoints"
    complete = complete_checkpoints(folder)
    if not complete:
        raise CheckpointError(f"{path}: neither a checkpoint nor a run with a complete one in {folder}")
    if which == "last":
        return complete[-1]
    if which == "best":
        return best_checkpoint(folder) or complete[-1]
    steps = {str(step_of(p)): p for p in complete}
    if which not in steps:
        raise CheckpointError(f"{folder}: no checkpoint of step {which}; there are {', '.join(steps)}")
    return steps[which]


def export(path: Path, out: Path, which: str = "best") -> dict[str, Any]:
    """Export a checkpoint; a report of what was written and proven.

    Raises:
        CheckpointError: there is no checkpoint, or files of it are missing.
        ExportError: the export does not repeat the checkpoint's probe loss.
    """
    checkpoint = find_checkpoint(path, which)
    state = ckpt.load_state(checkpoint)
    config = load_config(checkpoint / ckpt.CONFIG)
    weights = consolidated_weights(checkpoint)
    loss = write_export(
        out,
        weights,
        config.model,
        config.segmentation,
        {TOKENIZER: checkpoint / ckpt.TOKENIZER, PROBE: checkpoint / ckpt.PROBE, TRAINING: checkpoint / ckpt.CONFIG},
        state.provenance,
    )
    return {
        "export": str(out),
        "checkpoint": str(checkpoint),
        "step": state.provenance.step,
        "parameters": sum(w.numel() for w in weights.values()),
        "probe_loss_checkpoint": state.provenance.probe_loss,
        "probe_loss_export": loss,
    }


def consolidated_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All weights in float32, put together from the ranks' partitions.

    Raises:
        CheckpointError: files are missing or not what was written, or DeepSpeed is not installed.
    """
    if problem := content_problem(checkpoint, (0, 1)):
        raise CheckpointError(f"{checkpoint}: {problem}; use another checkpoint")
    state = ckpt.load_state(checkpoint)
    if state.is_whole:
        tensors = ckpt.whole_tensors(checkpoint)
        return {name: tensors(name)[0].float().clone() for name in state.parameters}
    try:
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints its progress
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{checkpoint}: reading a checkpoint needs {error.name}; install it, or export") from None
    except (OSError, ValueError, AssertionError, RuntimeError, KeyError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint}: files are missing or torn ({reason}); use another checkpoint") from None
    return {name: tensor.contiguous().clone() for name, tensor in weights.items()}
