"""What all ranks measure together: exchanges among all and between each two hosts, and a checkpoint that comes back.

Runs on the ranks; launch/preflight.py starts it.
"""

import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from tidal_dist.cluster.preflight.rounds import rounds
from tidal_dist.errors import UserError
from tidal_dist.training.commit import content_problem, final_folder, partial_folder
from tidal_dist.training.writer import Copied, Finishing, Target, Writing, announce, report_failure

_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}  # of a message, and of a rank's part of the checkpoint
_REPEATS = 3
_SLOWEST = 5
_WRITE_SECONDS = 60.0


def measure(folder: Path, device: torch.device) -> dict[str, Any]:
    """Everything; the same on all ranks. folder: for a checkpoint.

    Raises:
        RuntimeError: a rank was lost.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    hosts: list[str] = [""] * world
    dist.all_gather_object(hosts, socket.gethostname())
    message = torch.zeros(_BYTES.get(device.type, _BYTES["cpu"]), dtype=torch.uint8, device=device)
    found: dict[str, Any] = {"ranks": world, "backend": dist.get_backend(), "message_bytes": message.numel()}
    if world > 1:
        found |= _among_all(message, world)
        found["pairs"] = _between_pairs(message, hosts, rank)
    return found | {"checkpoint": _round_trip(folder, rank, world, message.numel())}


def _among_all(message: torch.Tensor, world: int) -> dict[str, float]:
    """GB/s that each rank moves, as NCCL's tests reckon it."""
    whole = torch.zeros(world * message.numel(), dtype=torch.uint8, device=message.device)
    reduce = _best_seconds(lambda: dist.all_reduce(message), message.device)
    gather = _best_seconds(lambda: dist.all_gather_into_tensor(whole, message), message.device)
    return {
        "all_reduce_gb_per_second": 2 * (world - 1) / world * message.numel() / reduce / 1e9,
        "all_gather_gb_per_second": (world - 1) * message.numel() / gather / 1e9,
    }


def _best_seconds(exchange: Callable[[], Any], device: torch.device) -> float:
    """Of the fastest of some, after one that connects."""
    seconds = []
    for _ in range(1 + _REPEATS):
        _finish(device)
        began = time.perf_counter()
        exchange()
        _finish(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _between_pairs(message: torch.Tensor, hosts: list[str], rank: int) -> dict[str, Any]:
    """GB/s in each direction between the first ranks of hosts, or of all ranks where there is one host."""
    firsts = [hosts.index(host) for host in dict.fromkeys(hosts)]
    units = firsts if len(firsts) > 1 else list(range(len(hosts)))
    names = [hosts[u] if len(firsts) > 1 else f"rank {u}" for u in units]
    own: dict[tuple[int, int], float] = {}
    for pairs in rounds(len(units)):
        for a, b in pairs:
            if rank in (units[a], units[b]):
                other = units[b] if rank == units[a] else units[a]
                own[a, b] = message.numel() / _exchange_seconds(message, other) / 1e9
    everybody: list[Any] = [None] * len(hosts)
    dist.all_gather_object(everybody, own)
    speeds = {pair: speed for each in everybody for pair, speed in each.items()}
    by_name = {name: median(s for pair, s in speeds.items() if u in pair) for u, name in enumerate(names)}
    slowest = sorted(speeds.items(), key=lambda item: item[1])[:_SLOWEST]
    return {
        "count": len(speeds),
        "median_gb_per_second": median(speeds.values()),
        "slowest": [{"pair": [names[a], names[b]], "gb_per_second": speed} for (a, b), speed in slowest],
        "median_by_host": by_name,
    }


def _exchange_seconds(message: torch.Tensor, other: int) -> float:
    """Of sending and receiving a message at the same time."""
    received = torch.empty_like(message)

    def exchange(n: int) -> None:
        send = dist.P2POp(dist.isend, message[:n], other)
        receive = dist.P2POp(dist.irecv, received[:n], other)
        for work in dist.batch_isend_irecv([send, receive]):
            work.wait()

    seconds = []
    for _ in range(_REPEATS):
        exchange(1)  # the other may still be busy with somebody else
        _finish(message.device)
        began = time.perf_counter()
        exchange(message.numel())
        _finish(message.device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _round_trip(folder: Path, rank: int, world: int, size: int) -> dict[str, Any]:
    """Write a checkpoint of random numbers as training does, and read another rank's part."""
    if rank == 0:
        with suppress(OSError):  # whoever writes will say it
            partial_folder(folder, 1).mkdir(parents=True)
    dist.barrier()
    found = _written_and_read(folder, rank, world, size)
    everybody: list[Any] = [None] * world
    dist.all_gather_object(everybody, found)
    if rank == 0:
        shutil.rmtree(final_folder(folder, 1), ignore_errors=True)
    problems = [each["problem"] for each in everybody if each["problem"]]
    return {**everybody[0], "problem": problems[0] if problems else None}


def _written_and_read(folder: Path, rank: int, world: int, size: int) -> dict[str, Any]:
    target = Target(partial_folder(folder, 1), final_folder(folder, 1), 1, world, _WRITE_SECONDS)
    own = Copied([(_file(rank), _numbers(rank, size))], [])
    writing = Writing(target, rank, own, Finishing(lambda _: {}, lambda: None) if rank == 0 else None)
    problem, began = None, time.perf_counter()
    try:
        announce(target.partial, rank)
    except UserError as error:
        problem = str(error)
    dist.barrier()
    if problem:
        report_failure(target.partial, rank, problem)
    else:
        writing.start()
        outcome = writing.wait()
        problem = f"cannot be written: {outcome.error}" if outcome.error else None
    dist.barrier()
    seconds = time.perf_counter() - began
    if problem:
        return {"problem": problem}
    return {"bytes": outcome.bytes, "seconds": seconds, "problem": _difference(target.final, rank, world, size)}


def _difference(checkpoint: Path, rank: int, world: int, size: int) -> str | None:
    other = (rank + 1) % world
    try:
        found = torch.load(checkpoint / _file(other), weights_only=True)
        if not torch.equal(found, _numbers(other, size)):
            return f"rank {rank} reads something else than rank {other} has written"
        return content_problem(checkpoint, (rank, world))
    except (OSError, UserError, RuntimeError) as error:
        return f"rank {rank} cannot read what rank {other} has written ({' '.join(str(error).split())[:200]})"


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def _numbers(rank: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(rank))
