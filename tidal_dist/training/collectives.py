"""Collectives that take too long or fail: what ends them, how that is known, and PyTorch's record of them."""

import json
import os
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from tidal_dist.diagnose.flights import FLIGHT, FLIGHT_OF_NCCL, describe


def watch_collectives(folder: Path) -> None:
    """Have NCCL end a collective that takes too long, and PyTorch record which one it was; what is set stays."""
    new = hasattr(torch._C._distributed_c10d, "_dump_fr_trace")  # the names of before give warnings
    prefix, file = (
        ("TORCH_FR_", "TORCH_FR_DUMP_TEMP_FILE") if new else ("TORCH_NCCL_TRACE_", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    )
    defaults = {
        f"{prefix}BUFFER_SIZE": "2000",
        file: str((folder / FLIGHT_OF_NCCL).absolute()),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",  # end the process; do not wait for the device to clean up
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def is_lost_contact(error: RuntimeError) -> bool:
    """Whether a collective failed because of another rank. gloo has no class of its own for that."""
    signs = ("third_party/gloo", "pair closure", "Connection closed by peer", "Timed out waiting")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def record_collectives(folder: Path) -> None:
    """Write down the collectives of this rank, where PyTorch has recorded them; NCCL does so by itself."""
    with suppress(AttributeError, OSError, RuntimeError):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{FLIGHT}{int(os.environ.get('RANK', '0')):05d}.json"
        path.write_bytes(_recorded())


def _recorded() -> bytes:
    recorder = torch._C._distributed_c10d
    name = "_dump_nccl_trace_json" if dist.is_initialized() and dist.get_backend() == "nccl" else "_dump_fr_trace_json"
    recorded = getattr(recorder, name)()
    return recorded if isinstance(recorded, bytes) else str(recorded).encode()


def last_collective() -> str | None:
    """The last collective that this rank took part in, where PyTorch has recorded it."""
    try:
        return describe(json.loads(_recorded()))
    except (AttributeError, RuntimeError, ValueError):
        return None
