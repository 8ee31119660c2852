"""What a run left behind, in a form in which two runs can be compared."""

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tidal_dist.errors import CheckpointError
from tidal_dist.history.json_lines import read_lines
from tidal_dist.history.log import ROLLING_HASH, read_log
from tidal_dist.history.scalars import SCALARS

LOSS = "train/loss"
_TAIL_BYTES = 250  # two lines and more


def recorded_losses(run: Path) -> dict[int, float]:
    """The training loss by step, as the run wrote it down."""
    lines = read_lines(run / SCALARS)
    return {line["step"]: float(line[LOSS]) for line in lines if LOSS in line}


def rolling_hashes(run: Path) -> dict[int, str]:
    """The rolling hash by step."""
    return {line.step: line.rolling_hash for line in read_log(run)}


def newest_step(run: Path) -> int:
    """The last step whose rolling hash is written down, read from the end of the file; 0: none is."""
    try:
        with open(run / ROLLING_HASH, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().split(b"\n")[1:-1]
    except FileNotFoundError:
        return 0
    return int(lines[-1].split(b"\t")[0]) if lines else 0


def tensor_digests(checkpoint: Path) -> dict[str, str]:
    """A hash of every tensor and number of a checkpoint's files: the ranks' weights and optimizer states, as they are.

    Needs the memory of one tensor. Two checkpoints of equally many ranks hold the same if their digests are equal.

    Raises:
        CheckpointError: there are no such files, or one cannot be read.
    """
    import torch

    digests: dict[str, str] = {}
    for file in sorted(checkpoint.glob("*.pt")):
        try:
            # The first one imports DeepSpeed, which writes a line.
            with contextlib.redirect_stdout(sys.stderr):
                content = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
        except Exception as error:  # of pickle, zip or whatever an object's own class raises
            raise CheckpointError(f"{file}: cannot read ({' '.join(str(error).split())})") from None
        digests |= dict(_digests(content, file.name))
    if not digests:
        raise CheckpointError(f"{checkpoint}: holds no weights")
    return digests


def _digests(value: Any, path: str) -> Iterator[tuple[str, str]]:
    import torch

    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield path, hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode() + data.tobytes()).hexdigest()
    elif isinstance(value, bool | int | float):
        yield path, repr(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _digests(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _digests(item, f"{path}/{i}")


def differences(ours: dict[Any, Any], theirs: dict[Any, Any]) -> list[Any]:
    """The keys under which the two do not hold the same, or only one holds something; in the order of the first."""
    return [key for key in ours | theirs if key not in ours or key not in theirs or ours[key] != theirs[key]]
