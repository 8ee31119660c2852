"""What a finished task leaves behind: which files it wrote, their hashes, and what it counted.

A receipt is written last, and it is believed only as far as the files agree with it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.files import replace_file, sha256_of
from data_pipeline.preparing.job import Job, hash_of


@dataclass(frozen=True)
class Receipt:
    """What one task did.

    Attributes:
        inputs: hash of all that the outputs depend on.
        outputs: (size, sha256) of each file, by its path in the work folder.
        result: counts and the like, as JSON.
    """

    inputs: str
    outputs: dict[str, tuple[int, str]]
    result: dict[str, Any]

    @property
    def made(self) -> str:
        """Hash of what the task made, whatever from."""
        return hash_of([self.outputs, self.result])

    def write(self, path: Path) -> None:
        """Store the receipt."""
        replace_file(path, json.dumps(vars(self) | {"hash": hash_of(vars(self))}).encode())

    @classmethod
    def read(cls, job: Job, stage: str, task: int) -> "Receipt | None":
        """The receipt of a task; None where there is none that is whole."""
        try:
            content = json.loads(job.path("receipts", stage, task, ".json").read_bytes())
            outputs = {name: (size, sha256) for name, (size, sha256) in content["outputs"].items()}
            receipt = cls(content["inputs"], outputs, content["result"])
            return receipt if hash_of(vars(receipt)) == content["hash"] else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def holds(self, folder: Path, content: bool = True) -> bool:
        """Whether the files are what was written, by their size and, where `content`, their hash."""
        try:
            return all(
                (folder / name).stat().st_size == size and (not content or sha256_of(folder / name) == sha256)
                for name, (size, sha256) in self.outputs.items()
            )
        except OSError:
            return False


def outputs_in(scratch: Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 of all files below a folder, by their path in it."""
    files = sorted(path for path in scratch.rglob("*") if path.is_file())
    return {str(path.relative_to(scratch)): (path.stat().st_size, sha256_of(path)) for path in files}
