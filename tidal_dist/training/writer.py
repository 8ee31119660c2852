"""Writing a checkpoint that lies copied in host memory, in a thread beside the training.

Threads of several ranks must not call collectives: each leaves a receipt in the folder that is being written, or word
that it failed; rank 0's thread waits for all of them and commits.
"""

import hashlib
import io
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch

from data_pipeline.files import replace_file
from tidal_dist.errors import UserError
from tidal_dist.training.commit import WrittenFile, clean_up, commit, written_file
from tidal_dist.training.digest import Digest, added, partial_digest, wrapped

_POLL_SECONDS = 0.05
_PATIENCE_SECONDS = 10.0  # with ranks that still write when another has failed
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class HostSlice:
    """A copy of a slice's weight and moments in host memory; `start` is its first element's index in the parameter."""

    name: str
    start: int
    tensors: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Copied:
    """What a rank's thread writes.

    Attributes:
        objects: by file name, what `torch.save` writes. slices: those that this rank counts in the digests.
    """

    objects: list[tuple[str, Any]]
    slices: list[HostSlice]


@dataclass(frozen=True)
class Target:
    """Where a checkpoint goes, the same on all ranks. timeout_seconds: how long rank 0 waits for the receipts."""

    partial: Path
    final: Path
    step: int
    ranks: int
    timeout_seconds: float


@dataclass(frozen=True)
class Finishing:
    """What rank 0 alone does when all have written.

    Attributes:
        files: further files by name, made from the digests of all parameters.
        after: called when the checkpoint is committed: marks the best, removes the old.
    """

    files: Callable[[dict[str, Digest]], dict[str, bytes]]
    after: Callable[[], None]


@dataclass
class Outcome:
    """How saving went on this rank; on rank 0, for all.

    Attributes:
        error: why there is no checkpoint, or not all that belongs to one.
        seconds: that writing took. stall_seconds: that training waited. bytes: of this rank; on rank 0, of all.
    """

    step: int
    is_committed: bool = False
    error: str | None = None
    seconds: float = 0.0
    stall_seconds: float = 0.0
    bytes: int = 0


@dataclass
class _Received:
    files: list[WrittenFile] = field(default_factory=list)
    digests: list[dict[str, list[int]]] = field(default_factory=list)


class Writing:
    """A save under way. finishing: on rank 0."""

    def __init__(self, target: Target, rank: int, copied: Copied, finishing: Finishing | None):
        self._target, self._rank, self._finishing = target, rank, finishing
        self._copied: Copied | None = copied
        self.outcome = Outcome(target.step)
        self.is_taken = False  # somebody has asked for the outcome
        self._thread = threading.Thread(target=self._run, name=f"checkpoint-{target.step}", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def is_done(self) -> bool:
        """Whether nothing is left to do on this rank."""
        return not self._thread.is_alive()

    def wait(self) -> Outcome:
        """How it went, once it is done."""
        self._thread.join()
        return self.outcome

    def _run(self) -> None:
        began = time.monotonic()
        try:
            self._write()
        except Exception as error:  # a thread must not die silently: what it says is asked for later
            self._give_up(_reason(error))
        self._copied = None  # the host memory is free again
        self.outcome.seconds = time.monotonic() - began

    def _give_up(self, reason: str) -> None:
        self.outcome.error = reason
        if self._finishing is None:
            report_failure(self._target.partial, self._rank, reason)
        elif not self.outcome.is_committed:
            with suppress(UserError, OSError):
                _receive(self._target, self._rank, reason)
            shutil.rmtree(self._target.partial, ignore_errors=True)

    def _write(self) -> None:
        assert self._copied is not None
        files = [write_object(self._target.partial / name, value) for name, value in self._copied.objects]
        digests = _digests(self._copied.slices)
        self.outcome.bytes = sum(file.bytes for file in files)
        marker = self._target.partial / _marker(self._rank)
        if self._finishing is None:
            # Renamed, so that nothing of it can be left when rank 0 looks at what is in the folder.
            marker.write_text(json.dumps({"files": [asdict(file) for file in files], "digests": digests}))
            marker.rename(_receipt(self._target.partial, self._rank))
            return
        marker.unlink()
        received = _receive(self._target, self._rank)
        self._finish([*files, *received.files], added([digests, *received.digests]))

    def _finish(self, files: list[WrittenFile], digests: dict[str, Digest]) -> None:
        assert self._finishing is not None
        partial = self._target.partial
        for name, data in self._finishing.files(digests).items():
            replace_file(partial / name, data)
        # What DeepSpeed wrote itself, such as optimizer states from NVMe, and what was written just now.
        known = {file.name for file in files}
        others = [p for p in partial.rglob("*") if p.is_file() and p.relative_to(partial).as_posix() not in known]
        files = [*files, *(written_file(partial, path) for path in others)]
        commit(partial, self._target.final, self._target.step, files)
        self.outcome.is_committed = True
        self.outcome.bytes = sum(file.bytes for file in files)
        self._finishing.after()
        clean_up(self._target.final.parent)


def announce(partial: Path, rank: int) -> None:
    """Leave the marker by which rank 0 learns, should this rank fail, that it did: renaming it needs no space.

    Raises:
        UserError: the disk refuses.
    """
    try:
        (partial / _marker(rank)).touch()
    except OSError as error:
        raise UserError(f"{partial}: rank {rank} cannot write there ({error.strerror})") from None


def report_failure(partial: Path, rank: int, reason: str) -> None:
    """Tell rank 0 why this rank cannot write, and free the space that it has taken."""
    marker = partial / _marker(rank)
    with suppress(OSError):
        marker.write_text(reason, "utf-8")
    with suppress(OSError):
        marker.rename(partial / _failure(rank))


def _receive(target: Target, own_rank: int, own_failure: str | None = None) -> _Received:
    """The receipts of the other ranks.

    Raises:
        UserError: a rank failed, or is silent for too long. Those that still write have then ended, or had the time to.
    """
    received, missing = _Received(), [rank for rank in range(target.ranks) if rank != own_rank]
    failure, last = own_failure, time.monotonic() + (_PATIENCE_SECONDS if own_failure else target.timeout_seconds)
    while missing and time.monotonic() < last:
        for rank in list(missing):
            receipt, failed = _receipt(target.partial, rank), target.partial / _failure(rank)
            if failed.exists():
                missing.remove(rank)
                failure = failure or failed.read_text("utf-8", "replace") or f"rank {rank} could not write"
                last = min(last, time.monotonic() + _PATIENCE_SECONDS)
            elif receipt.exists():
                missing.remove(rank)
                content = json.loads(receipt.read_bytes())
                received.files += [WrittenFile(**record) for record in content["files"]]
                received.digests.append(content["digests"])
                receipt.unlink()
        if missing:
            time.sleep(_POLL_SECONDS)
    if missing and failure is None:
        failure = f"rank {missing[0]} has not written its part within {target.timeout_seconds:.0f} s"
    if failure is not None:
        raise UserError(failure)
    return received


def _marker(rank: int) -> str:
    return f".rank-{rank:05d}.writing"


def _failure(rank: int) -> str:
    return f".rank-{rank:05d}.failed"


def _receipt(partial: Path, rank: int) -> Path:
    return partial / f".rank-{rank:05d}.json"


def _digests(slices: list[HostSlice]) -> dict[str, list[int]]:
    sums: dict[str, list[int]] = {}
    for part in slices:
        digests = [int(partial_digest(tensor, part.start)) for tensor in part.tensors]
        digests += [0] * (3 - len(digests))
        sums[part.name] = [wrapped(a + b) for a, b in zip(sums.get(part.name, [0, 0, 0]), digests, strict=True)]
    return sums


def write_object(path: Path, value: Any) -> WrittenFile:
    """What `torch.save` writes of a value, on the disk; hashed on the way.

    Raises:
        OSError: the disk refuses; what was written of the file is gone.
    """
    with open(path, "wb", buffering=_BUFFER_BYTES) as file:
        hashed = _HashedFile(file)
        try:
            # To a file object: it hashes on the way, and the interpreter's lock is free while the disk is busy.
            torch.save(value, cast(IO[bytes], hashed))
            file.flush()
            os.fsync(file.fileno())
        except Exception as error:
            with suppress(OSError):
                file.truncate(0)
            # torch turns what its file raises into a RuntimeError of its own.
            raise (hashed.error or error) from None
    return WrittenFile(path.name, hashed.bytes, hashed.sha256.hexdigest())


class _HashedFile(io.RawIOBase):
    """Hashes what goes through it, and keeps the error that it raised."""

    def __init__(self, file: Any):
        self._file, self.sha256, self.bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write and hash."""
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(data)
        self.bytes += written
        return written

    def writable(self) -> bool:
        """It is."""
        return True


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
