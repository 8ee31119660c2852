"""Where the ranks of several hosts meet: an address of the first host that all others have reached, and how.

Nothing is guessed from names: the first host listens for a moment on the port that the ranks will use, and the others
connect to every address that it has.
"""

import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from data_pipeline.errors import UserError
from tidal_dist.cluster.asking import Answer, ask, ask_each
from tidal_dist.cluster.transport import Transport

_ASK_SECONDS = 20.0
_MEET_SECONDS = 10.0
_NAMED = 8
_UNKNOWN_SPEEDS = (0, 65535)


@dataclass(frozen=True)
class Network:
    """Where the ranks meet.

    Attributes:
        address: of the first host; port: free there. interfaces: by host, the one that leads to the others.
        reason: why this address.
    """

    address: str
    port: int
    interfaces: dict[str, str]
    reason: str

    @property
    def interface(self) -> str | None:
        """The name that the interface has on all hosts; none: there is one host, or it has several names."""
        names = set(self.interfaces.values())
        return names.pop() if len(names) == 1 else None


def find_network(
    transport: Transport, hosts: Sequence[str], address: str | None = None, port: int | None = None
) -> Network:
    """Try which address of the first host all others reach.

    Args:
        address, port: those that the user wants; none: whatever works.

    Raises:
        UserError: a host does not answer, or there is no such address.
    """
    first, *others = hosts
    answers = ask(transport, hosts, ["addresses"], _ASK_SECONDS)
    _check(answers)
    own = {answer.host: answer.found["interfaces"] for answer in answers}
    port = port or answers[0].found["port"]
    if not others:
        return Network(address or "127.0.0.1", port, {}, f"{first} is the only host")
    candidates = [address] if address else fastest_first(own[first])
    if not candidates:
        raise UserError(f"{first}: has no network but its own loopback, so no other host can reach it")
    heard, met = _meet(transport, hosts, candidates, port)
    if problem := heard.found.get("problem"):
        raise UserError(f"{first}: port {port} cannot be used ({problem}); give another --master-port")
    return _chosen(hosts, candidates, own, met, port)


def _check(answers: Sequence[Answer]) -> None:
    problems = [answer.problem for answer in answers if answer.problem]
    if problems:
        raise UserError("; ".join(problems))


def fastest_first(interfaces: dict[str, tuple[str, int]]) -> list[str]:
    """The addresses of a host by which others may reach it. interfaces: of the task `addresses`."""

    def speed(address: str) -> int:
        known = interfaces[address][1]
        return 0 if known in _UNKNOWN_SPEEDS else known

    return sorted((a for a in interfaces if not a.startswith("127.")), key=lambda address: -speed(address))


def _meet(transport: Transport, hosts: Sequence[str], candidates: list[str], port: int) -> tuple[Answer, list[Answer]]:
    """The first host's answer, and those of the others."""
    first, *others = hosts
    token = secrets.token_hex(8)
    tasks: dict[str, list[object]] = {first: ["listen", port, token, len(others), _MEET_SECONDS]}
    tasks |= {host: ["reach", port, token, _MEET_SECONDS, *candidates] for host in others}
    heard, *met = ask_each(transport, tasks, _MEET_SECONDS + _ASK_SECONDS)
    _check([heard, *met])
    return heard, met


def _chosen(
    hosts: Sequence[str],
    candidates: list[str],
    own: dict[str, dict[str, tuple[str, int]]],
    met: list[Answer],
    port: int,
) -> Network:
    first = hosts[0]
    chosen = next((a for a in candidates if all(a in answer.found["reached"] for answer in met)), None)
    if chosen is None:
        missing = [answer.host for answer in met if not answer.found["reached"]] or [met[0].host]
        raise UserError(
            f"{first}: {', '.join(missing)} cannot connect to port {port} of {' or '.join(candidates)}; open the ports "
            "between the hosts (firewall), or name an address that all reach with --master-addr"
        )
    reason = f"{', '.join(a.host for a in met[:_NAMED])}{' and more' if len(met) > _NAMED else ''} reached it"
    interfaces = {answer.host: own[answer.host][answer.found["reached"][chosen]][0] for answer in met}
    if chosen in own[first]:
        interfaces[first] = own[first][chosen][0]
    return Network(chosen, port, interfaces, reason)


def interface_to(address: str) -> str | None:
    """The interface of this host that leads to an address, or has it; none: the loopback, or there is no way."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.connect((address, 9))  # sends nothing
            local = s.getsockname()[0]
    except OSError:
        return None
    names = [name for name, all_of_it in psutil.net_if_addrs().items() if any(a.address == local for a in all_of_it)]
    return next((name for name in names if not local.startswith("127.")), None)
