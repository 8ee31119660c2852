"""The last collective of a rank, from what PyTorch's Flight Recorder wrote when one of them did not end."""

import io
import json
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

from tidal_dist.training.heartbeat import HEARTBEATS

FLIGHT = "flight-"
FLIGHT_OF_NCCL = "flight-nccl-"


class _PlainValues(pickle.Unpickler):
    """Reads pickled lists, dicts, numbers and texts; whatever else stands in the file is refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"{module_name}.{global_name} has no place in a record of collectives")


def last_collective(run: Path, rank: int) -> str | None:
    """The last collective that a rank took part in, if a record is there."""
    folder = run / HEARTBEATS
    with suppress(OSError, ValueError):
        return describe(json.loads((folder / f"{FLIGHT}{rank:05d}.json").read_bytes()))
    with suppress(OSError, ValueError, pickle.UnpicklingError, EOFError, KeyError, IndexError, AttributeError):
        return describe(_PlainValues(io.BytesIO((folder / f"{FLIGHT_OF_NCCL}{rank}").read_bytes())).load())
    return None


def describe(record: Any) -> str | None:
    """The last collective of a record: its number, kind, state and who called it; none: there is none, or no record."""
    try:
        entry = max(record["entries"], key=lambda e: e["record_id"])
        kind = entry["profiling_name"].partition(":")[2] or entry["profiling_name"]
        callers = [f for f in entry.get("frames", []) if not _is_library(f["filename"])]
        caller = f", called at {Path(callers[0]['filename']).name}:{callers[0]['line']}" if callers else ""
        state = "done" if entry.get("time_discovered_completed_ns") else entry["state"]
        return f"number {entry['collective_seq_id']}, {kind} of group {entry['process_group'][0]} ({state}{caller})"
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None


def _is_library(filename: str) -> bool:
    return "/torch/" in filename or "/deepspeed/" in filename
