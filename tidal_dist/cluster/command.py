"""The deepspeed launcher's arguments for a job on several hosts, by the launcher below it."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_pipeline.errors import UserError

if TYPE_CHECKING:
    from tidal_dist.cluster.network import Network
    from tidal_dist.cluster.placement import Placement

PDSH, SLURM = "pdsh", "slurm"
# The ssh below pdsh asks nothing, and notices a host that is gone within 15 s.
SSH_ARGUMENTS = "-o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=3"


@dataclass(frozen=True)
class _Kind:
    """How a launcher is told things.

    Attributes:
        tells_address: it gives the ranks MASTER_ADDR and MASTER_PORT; where it does not, their environment must.
        by_name: its arguments that hand variables on by their names. on_interface: that use a network's interface.
    """

    tells_address: bool
    by_name: Callable[[Sequence[str]], list[str]] = lambda _: []
    on_interface: Callable[[str], list[str]] = lambda _: []


def _one_by_one(names: Sequence[str]) -> list[str]:
    return [word for name in names for word in ("-x", name)]


def _as_list(names: Sequence[str]) -> list[str]:
    return ["-genvlist", ",".join(names)]


def _mca(interface: str) -> list[str]:
    return ["--mca", "btl_tcp_if_include", interface, "--mca", "oob_tcp_if_include", interface]


_KINDS = {
    PDSH: _Kind(True),
    SLURM: _Kind(False),  # srun hands on everything
    "openmpi": _Kind(False, _one_by_one, _mca),
    "mpich": _Kind(True, _as_list, lambda interface: ["-iface", interface]),
    "impi": _Kind(True, _as_list, lambda interface: ["-iface", interface]),
    "mvapich": _Kind(False, _as_list, lambda interface: ["-iface", interface]),
}
LAUNCHERS = tuple(_KINDS)


def tells_address(launcher: str) -> bool:
    """Whether the ranks get MASTER_ADDR and MASTER_PORT from it."""
    return _KINDS[launcher].tells_address


def check_placement(placement: "Placement", launcher: str) -> None:
    """Raises UserError where a launcher cannot place ranks so."""
    if launcher == PDSH:
        return
    for host, slots in placement.hosts.items():
        if slots != tuple(range(len(slots))):
            raise UserError(
                f"--launcher {launcher} cannot choose slots {','.join(map(str, slots))} of {host}; use pdsh"
            )
    counts = {host: len(slots) for host, slots in placement.hosts.items()}
    if launcher != "openmpi" and len(set(counts.values())) > 1:
        raise UserError(f"--launcher {launcher} needs as many slots on every host, not {counts}; use pdsh")


def launcher_arguments(
    placement: "Placement",
    launcher: str,
    network: "Network",
    names: Sequence[str],
    is_local: bool = False,
    ssh_port: int | None = None,
    further: Sequence[str] = (),
) -> list[str]:
    """What the deepspeed launcher is told.

    Args:
        names: of the variables that ranks need. is_local: the only host is this machine, so nothing is in between.
        further: arguments of the launcher below.
    """
    kind = _KINDS[launcher]
    given = placement.launcher_arguments()
    if launcher not in (PDSH, SLURM):
        given = given[: given.index("--include")]  # they refuse it; the hostfile has these hosts alone
    given += ["--launcher", launcher, "--master_addr", network.address, "--master_port", str(network.port)]
    given += ["--no_ssh_check"]  # all hosts have been asked
    if not is_local:
        given += ["--force_multi"]
    if ssh_port:
        given += ["--ssh_port", str(ssh_port)]
    below = [*kind.by_name(names), *(kind.on_interface(network.interface) if network.interface else []), *further]
    return given + ([f"--launcher_args={shlex.join(below)}"] if below else [])
