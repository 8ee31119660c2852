"""Which rank a process is, and where the ranks meet, whatever has started them.

DeepSpeed's own launcher and torchrun tell both. mpirun and srun tell the rank, in variables of their own, and not where
to meet: DeepSpeed would ask mpi4py, which must be built for that very MPI. Here rank 0 leaves a note in the run folder,
which the ranks share, and the others try the addresses in it.
"""

import json
import os
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.files import replace_file
from tidal_dist.cluster import there
from tidal_dist.cluster.network import fastest_first, interface_to

# Variables of rank, rank on its host, number of ranks, and of those on this host, which may be missing. Whoever comes
# first counts: mpirun may itself have been started by srun, with one task a host.
_SAID_BY = {
    "the launcher": ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MVAPICH": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
    "MPICH and Intel MPI": ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
    # Not SLURM_NTASKS, which the batch script has too: it is alone, and no rank.
    "srun": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
}
_NOTE = ".meeting"
_PORT = 29500  # where nothing else is said, as in DeepSpeed
_MEET_SECONDS = 120.0
_TRY_SECONDS = 3.0


@dataclass(frozen=True)
class Place:
    """Of a rank among all, and among those of its host; `local_world`: None where nobody says."""

    rank: int
    local_rank: int
    world: int
    local_world: int | None


def place(variables: Mapping[str, str]) -> Place | None:
    """The place that an environment tells; none: it was started alone."""
    for *needed, fourth in _SAID_BY.values():
        with suppress(KeyError, ValueError):
            rank, local_rank, world = (int(variables[name]) for name in needed)
            more = variables.get("LOCAL_WORLD_SIZE") or variables.get(fourth, "")
            # Of Slurm's `8(x2),4` the host's own number cannot be told.
            same = more.partition("(")[0] if "," not in more else ""
            return Place(rank, local_rank, world, int(same) if same.isdigit() else None)
    return None


def discover(run: Path) -> None:
    """Set the variables by which the ranks join, those that the launcher has not set.

    Args:
        run: the run's folder.

    Raises:
        UserError: the ranks cannot find each other.
    """
    found = place(os.environ) or Place(0, 0, 1, 1)
    says = {"RANK": found.rank, "LOCAL_RANK": found.local_rank, "WORLD_SIZE": found.world}
    if found.local_world:
        says["LOCAL_WORLD_SIZE"] = found.local_world
    os.environ |= {name: str(value) for name, value in says.items()}
    if "MASTER_ADDR" not in os.environ:
        address, port = ("127.0.0.1", there.addresses()["port"]) if found.world == 1 else _meet(run, found)
        os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    os.environ.setdefault("MASTER_PORT", str(_PORT))
    if found.world != found.local_world and (interface := interface_to(os.environ["MASTER_ADDR"])):
        # By itself gloo takes the address that the host's name has there, which is often 127.0.1.1.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _meet(run: Path, own: Place) -> tuple[str, int]:
    note = run / _NOTE
    return _wait_for_others(note, own) if own.rank == 0 else _reach_first(note, own)


def _wait_for_others(note: Path, own: Place) -> tuple[str, int]:
    """Rank 0: say where, and wait until all others have come."""
    network, token = there.addresses(), secrets.token_hex(8)
    port = int(os.environ.get("MASTER_PORT", network["port"]))
    addresses = ["127.0.0.1"] if own.world == own.local_world else fastest_first(network["interfaces"])
    if not addresses:
        raise UserError("rank 0: its host has no network but its own loopback, so no other host can reach it")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        replace_file(note, json.dumps({"token": token, "port": port, "addresses": addresses}).encode())
        heard = there.listen(str(port), token, str(own.world - 1), str(_MEET_SECONDS))
    except OSError as error:
        raise UserError(f"{note}: cannot write ({error.strerror}); {_OTHERWISE}") from None
    finally:
        note.unlink(missing_ok=True)
    if problem := heard.get("problem"):
        raise UserError(f"rank 0: port {port} cannot be used ({problem}); {_OTHERWISE}")
    if (missing := own.world - 1 - heard["heard"]) > 0:
        raise UserError(
            f"rank 0: {missing} of {own.world} ranks have not come within {_MEET_SECONDS:g} s; is {note.parent} shared "
            f"by all hosts, and {' or '.join(addresses)} reached from them? If not, {_OTHERWISE}"
        )
    return addresses[0], port


def _reach_first(note: Path, own: Place) -> tuple[str, int]:
    """Another rank: look for the note until what it says is true. One that an earlier launch has left is not."""
    deadline = time.monotonic() + _MEET_SECONDS
    said: dict[str, Any] = {}
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError):
            said = json.loads(note.read_bytes())
            met = there.reach(str(said["port"]), said["token"], str(_TRY_SECONDS), *said["addresses"])["reached"]
            if reached := [address for address in said["addresses"] if address in met]:
                return reached[0], said["port"]
        time.sleep(0.1)
    seen = f"port {said['port']} of {' or '.join(said['addresses'])} is not reached" if said else "it has left no note"
    raise UserError(f"rank {own.rank}: rank 0 is not met through {note} ({seen}); share the folder, or {_OTHERWISE}")


_OTHERWISE = "give all ranks MASTER_ADDR, the address of rank 0, and MASTER_PORT"
