"""The device that a name stands for, and what it has free."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tidal_dist.errors import UserError

_ONE_THREAD_PARAMETERS = 10_000_000


def is_small(model: torch.nn.Module) -> bool:
    """Whether passes of few slots through a model gain nothing from more threads than one."""
    return sum(p.numel() for p in model.parameters()) < _ONE_THREAD_PARAMETERS


@contextmanager
def one_thread(applies: bool) -> Iterator[None]:
    """Compute on one CPU thread meanwhile: several wait for each other in every call, long on a busy machine."""
    threads = torch.get_num_threads()
    if applies:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def available_device(name: str, where: str) -> str:
    """The name of a device that works here; "auto" is a GPU if there is one, else the CPU.

    Raises:
        UserError: there is no such device; `where` says who asked for it.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where} {name}: not available ({reason}); try {where} cpu") from None
    return name


def free_memory(device: str) -> int:
    """Bytes that may still be allocated on a device."""
    if torch.device(device).type == "cuda":
        # What PyTorch holds without using it is not free to others, but is to this process.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(torch.device(device))[0] + unused
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        pass
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return free if limit == resource.RLIM_INFINITY else min(free, limit)
