"""TensorBoard's files of a run, cut back where the run goes on from an earlier step.

TensorBoard's own means for this, `purge_step`, is not enough: its server (2.21) loads files in two ways; one does not
heed it, and the other drops old points of a curve only when it meets a new one of the same curve.

A file is a sequence of records: length (8 bytes), its checksum (4), the event, its checksum (4).
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data_pipeline.files import whole_file
from tidal_dist.errors import UserError

PATTERN = "*tfevents*"


def cut_back(folder: Path, start: int) -> None:
    """Remove what was written after step `start`; 0: everything. A record that was torn goes too.

    Raises:
        UserError: a file cannot be read or replaced.
    """
    for path in sorted(folder.glob(PATTERN)):
        try:
            if not start:
                path.unlink()
            elif _is_behind(path, start):
                _cut_file(path, start)
        except OSError as error:
            raise UserError(f"{path}: cannot cut back ({error.strerror}); move {folder} away, then resume") from None


def _is_behind(path: Path, start: int) -> bool:
    """Whether anything in the file is later than `start` or torn."""
    with open(path, "rb") as file:
        whole = 0
        for record in _records(file):
            if _step(record) > start:
                return True
            whole += len(record)
        return whole != path.stat().st_size


def _cut_file(path: Path, start: int) -> None:
    with open(path, "rb") as file, whole_file(path) as kept:
        for record in _records(file):
            if _step(record) <= start:
                kept.write(record)


def _records(file: BinaryIO) -> Iterator[bytes]:
    """The whole records of a file, headers and checksums included."""
    while len(header := file.read(12)) == 12:
        rest = struct.unpack("<Q", header[:8])[0] + 4
        if rest > 1 << 31 or len(body := file.read(rest)) < rest:
            return
        yield header + body


def _step(record: bytes) -> int:
    from tensorboard.compat.proto.event_pb2 import Event

    return Event.FromString(record[12:-4]).step
