"""Loading a checkpoint that was saved on another number of ranks, under another ZeRO stage, or with other offloading.

DeepSpeed's own converter makes of it one file for each tensor of each parameter, the universal checkpoint. Every rank
then copies out of these what it owns now. DeepSpeed's own loader of universal checkpoints is not used: it refuses to go
from stage 3 to others and back, and under stage 3 it gives every parameter the settings of the optimizer's first group,
so that what must not decay decays.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import one_line
from tidal_dist.errors import CheckpointError
from tidal_dist.training import engine as ds
from tidal_dist.training.checkpoint import TrainingState, whole_tensors
from tidal_dist.training.slices import MOMENTS, owned_slices, refresh_parameters, set_step_count

Source = Callable[[str], tuple[torch.Tensor, ...]]
_LOG = "log"
_WAIT_SECONDS = 2.0
_MOST_WORKERS = 8


def load_other_layout(engine: Any, checkpoint: Path, state: TrainingState, is_first: bool) -> None:
    """Load weights and optimizer on all ranks, whatever the layout that they were saved in.

    Raises:
        CheckpointError: the checkpoint cannot be converted.
    """
    with _source(checkpoint, state, is_first) as source:
        set_step_count(engine, state.optimizer_steps)
        ds.together(lambda: _fill(engine, source, checkpoint))
        refresh_parameters(engine)
        engine.global_steps = state.provenance.step
        engine.global_samples = state.provenance.rows


def _fill(engine: Any, source: Source, checkpoint: Path) -> None:
    try:
        for part in owned_slices(engine):
            for target, whole in zip(part.tensors, source(part.name), strict=True):
                target.copy_(whole.reshape(-1)[part.start : part.start + target.numel()])
    except (OSError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{checkpoint}: its conversion cannot be read ({one_line(error)})") from None


@contextmanager
def _source(checkpoint: Path, state: TrainingState, is_first: bool) -> Iterator[Source]:
    if state.is_whole:
        yield whole_tensors(checkpoint)
        return
    folder = checkpoint.with_name(f".{checkpoint.name}.universal")
    try:
        _convert_on_first_rank(checkpoint, folder, is_first)
        yield lambda name: _universal_tensors(folder / "converted" / "zero" / name)
    finally:
        # A kill in between leaves it: nothing ever reads a conversion again, and the next save removes it.
        if is_first:
            shutil.rmtree(folder, ignore_errors=True)


def _universal_tensors(folder: Path) -> tuple[torch.Tensor, ...]:
    # Mapped: a rank reads from the disk only the part that it owns.
    found = (torch.load(folder / f"{key}.pt", mmap=True, weights_only=False) for key in ("fp32", *MOMENTS))
    return tuple(value["param"] if isinstance(value, dict) else value for value in found)


def _convert_on_first_rank(checkpoint: Path, folder: Path, is_first: bool) -> None:
    """Convert; meanwhile the ranks keep in touch, since a large checkpoint takes longer than they wait for each other.

    Raises:
        CheckpointError: the converter failed.
    """
    process = ds.together(lambda: _start_conversion(checkpoint, folder) if is_first else None)
    while not ds.agree(is_done=process is not None and _has_ended(process))["is_done"]:
        pass
    ds.together(lambda: _check_conversion(process, checkpoint, folder) if process else None)


def _start_conversion(checkpoint: Path, folder: Path) -> "subprocess.Popen[str]":
    shutil.rmtree(folder, ignore_errors=True)
    workers = str(max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0)) // 4)))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint), "--output_folder", str(folder / "converted")]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    try:
        folder.mkdir(parents=True)
        with open(folder / _LOG, "w", encoding="utf-8") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot convert the checkpoint here ({error.strerror})") from None


def _has_ended(process: "subprocess.Popen[str]") -> bool:
    try:
        process.wait(timeout=_WAIT_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


def _check_conversion(process: "subprocess.Popen[str]", checkpoint: Path, folder: Path) -> None:
    if process.returncode:
        lines = (folder / _LOG).read_text("utf-8", "replace").splitlines() or [""]
        raise CheckpointError(
            f"{checkpoint}: cannot be converted to this number of ranks or stage ({lines[-1].strip()}); "
            "free space beside it, or resume with what it was saved with"
        )
