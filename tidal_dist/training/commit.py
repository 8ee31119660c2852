"""The folder of a checkpoint, which exists whole or not at all, and which of a run's checkpoints are kept.

RUN/checkpoints/
  step-NNNNNNNN/           takes this name when everything in it lies on the disk
    *.pt                   DeepSpeed's files
    state.json, config.yaml, tokenizer.json, probe.safetensors, and texts.json where the step was validated
    COMMIT                 written last: step, and bytes and sha256 of every file
  .step-NNNNNNNN.*         a save under way, or what a kill left of one: the next save removes it
  best.json                the best checkpoint by generation on held-out documents
  best-loss.json           the best by the loss on held-out rows
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.files import read_description, replace_file, sha256_of, sync
from tidal_dist.errors import CheckpointError

COMMIT, BEST, BEST_LOSS = "COMMIT", "best.json", "best-loss.json"
FORMAT = 1
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_LEFTOVERS = ".step-*"


@dataclass(frozen=True)
class WrittenFile:
    """A file as it was written: path within the checkpoint, size, hash."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that cannot be resumed from, and why."""

    checkpoint: str
    reason: str


def final_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return folder / f"step-{step:08d}"


def partial_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written."""
    return folder / f".step-{step:08d}.partial"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name tells."""
    match = _STEP_FOLDER.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def written_file(folder: Path, path: Path) -> WrittenFile:
    """The record of a file that is there already, put on the disk."""
    sync(path)
    return WrittenFile(path.relative_to(folder).as_posix(), path.stat().st_size, sha256_of(path))


def commit(partial: Path, final: Path, step: int, files: Iterable[WrittenFile]) -> None:
    """Make a checkpoint of a folder whose files lie on the disk; one that has its name already is replaced.

    Raises:
        OSError, UserError: the disk refuses.
    """
    content = {"format": FORMAT, "step": step, "files": [asdict(f) for f in sorted(files, key=lambda f: f.name)]}
    replace_file(partial / COMMIT, json.dumps(content, indent=1).encode())
    for inner in [path for path in partial.rglob("*") if path.is_dir()]:
        sync(inner)
    sync(partial)
    if final.exists():
        os.rename(final, final.with_name(f".{final.name}.replaced"))
    os.rename(partial, final)
    sync(final.parent)


def committed_files(checkpoint: Path) -> list[WrittenFile]:
    """What the marker of a checkpoint says that it holds.

    Raises:
        CheckpointError: there is no marker, or it cannot be read.
    """
    remedy = "use an older checkpoint"
    absent = f"{checkpoint}: no {COMMIT}, so this is no complete checkpoint"
    content, _ = read_description(checkpoint / COMMIT, FORMAT, {"step", "files"}, CheckpointError, absent, remedy)
    try:
        return [WrittenFile(**record) for record in content["files"]]
    except TypeError:
        raise CheckpointError(f"{checkpoint / COMMIT}: not as it was written; {remedy}") from None


def complete_checkpoints(folder: Path) -> list[Path]:
    """The committed checkpoints in a folder, oldest first."""
    return [path for path in _step_folders(folder) if _is_committed(path)]


def _step_folders(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("step-*") if _STEP_FOLDER.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def _is_committed(checkpoint: Path) -> bool:
    try:
        committed_files(checkpoint)
    except CheckpointError:
        return False
    return True


def resumable(folder: Path) -> tuple[list[Path], list[Skipped]]:
    """The committed checkpoints whose files are there in full length, newest first; the others, and why not."""
    found, skipped = [], []
    for path in reversed(_step_folders(folder)):
        problem = _length_problem(path)
        if problem is None:
            found.append(path)
        else:
            skipped.append(Skipped(path.name, problem))
    return found, skipped


def _length_problem(checkpoint: Path) -> str | None:
    try:
        files = committed_files(checkpoint)
    except CheckpointError as error:
        return str(error).removeprefix(f"{checkpoint}: ")
    for file in files:
        try:
            size = (checkpoint / file.name).stat().st_size
        except OSError:
            return f"{file.name} is not there"
        if size != file.bytes:
            return f"{file.name} has {size:,} bytes instead of {file.bytes:,}"
    return None


def content_problem(checkpoint: Path, share: tuple[int, int]) -> str | None:
    """The first file whose content is not what was written, among those that fall to rank `share[0]` of `share[1]`.

    Dealt out like this every byte of the checkpoint is read once, by all ranks side by side, and the small files that
    only rank 0 would read are checked too.
    """
    largest_first = sorted(committed_files(checkpoint), key=lambda file: (-file.bytes, file.name))
    for file in largest_first[share[0] :: share[1]]:
        try:
            found = sha256_of(checkpoint / file.name)
        except OSError as error:
            return f"{file.name} cannot be read ({error.strerror})"
        if found != file.sha256:
            return f"{file.name} is not what was written (sha256 {found[:12]} instead of {file.sha256[:12]})"
    return None


def best_checkpoint(folder: Path, mark: str = BEST) -> Path | None:
    """The checkpoint marked as best, if it is there. mark: `BEST` or `BEST_LOSS`."""
    try:
        path = folder / json.loads((folder / mark).read_bytes())["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return path if _is_committed(path) else None


def mark_best(folder: Path, mark: str, checkpoint: Path, metrics: dict[str, Any]) -> None:
    """Write `mark`: the checkpoint is the best so far."""
    replace_file(folder / mark, json.dumps({"checkpoint": checkpoint.name, "metrics": metrics}, indent=1).encode())


def clean_up(folder: Path) -> None:
    """Remove what killed processes left; no save may be under way."""
    for leftover in folder.glob(_LEFTOVERS):
        shutil.rmtree(leftover, ignore_errors=True)


def discard_after(folder: Path, step: int) -> None:
    """Take away the checkpoints of later steps, which a run that goes back to `step` never made."""
    for path in _step_folders(folder):
        if step_of(path) > step:
            _remove(path)


def remove_old(folder: Path, newest: int, keep: int, every_steps: int | None) -> None:
    """Remove what need not be kept, now that the checkpoint of step `newest` is committed.

    Args:
        keep: newest checkpoints to keep. every_steps: checkpoints of its multiples are kept as well, and the best ones.
    """
    discard_after(folder, newest)  # damaged ones, which the run resumed in front of
    kept = {best_checkpoint(folder), best_checkpoint(folder, BEST_LOSS)}
    complete = complete_checkpoints(folder)
    kept |= set(_those_kept(complete, keep, every_steps))
    for path in _step_folders(folder):
        if path not in kept:
            _remove(path)


def _those_kept(complete: Sequence[Path], keep: int, every_steps: int | None) -> list[Path]:
    return [*complete[-keep:], *(p for p in complete if every_steps and step_of(p) % every_steps == 0)]


def _remove(checkpoint: Path) -> None:
    # Renamed first: a kill among the deletions must not leave something that looks like a checkpoint.
    removed = checkpoint.with_name(f".{checkpoint.name}.removed")
    os.rename(checkpoint, removed)
    shutil.rmtree(removed, ignore_errors=True)
