"""Which slots of which hosts hold the ranks of a launch, and where fewer ranks would stand."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tidal_dist.errors import UserError
from tidal_dist.launching import local_ranks

_HOST = re.compile(r"(\S+)\s+slots=(\d+)")


@dataclass(frozen=True)
class Placement:
    """A rank on each of these slots.

    Attributes:
        hosts: slots by host. hostfile: that names them; none: `hosts` is this machine alone.
        further: arguments that the launcher takes as they are.
    """

    hosts: dict[str, tuple[int, ...]]
    hostfile: Path | None = None
    further: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """Their number."""
        return sum(map(len, self.hosts.values()))

    def launcher_arguments(self) -> list[str]:
        """What the deepspeed launcher is told."""
        if self.hostfile is None:
            return [*local_ranks(self.ranks), *self.further]
        include = "@".join(f"{host}:{','.join(map(str, slots))}" for host, slots in self.hosts.items())
        return ["--hostfile", str(self.hostfile), "--include", include, *self.further]

    def with_ranks(self, ranks: int) -> "Placement | None":
        """So many ranks on equally many slots of as many of these hosts as possible; none: there is no such way."""
        for n_hosts in range(len(self.hosts), 0, -1):
            first = dict(list(self.hosts.items())[:n_hosts])
            each, rest = divmod(ranks, n_hosts)
            if not rest and 0 < each <= min(map(len, first.values())):
                return replace(self, hosts={host: slots[:each] for host, slots in first.items()})
        return None

    def another(self, fits: Callable[[int], bool]) -> "Placement | None":
        """The most ranks below this number that `fits` and can be placed; none: there are none."""
        placed = (self.with_ranks(n) for n in range(self.ranks - 1, 0, -1) if fits(n))
        return next((placement for placement in placed if placement), None)


def on_this_machine(ranks: int, further: tuple[str, ...] = ()) -> Placement:
    """So many ranks here."""
    return Placement({"localhost": tuple(range(ranks))}, None, further)


def on_hosts(hostfile: Path, include: str, exclude: str, further: tuple[str, ...]) -> Placement:
    """All slots of a hostfile (`host slots=8` a line), or those that `include` names, or all but those of `exclude`.

    Args:
        include, exclude: as the deepspeed launcher has them: `host:0,1@other`; "": nothing.

    Raises:
        UserError: the hostfile cannot be read, or hosts or slots are named that it does not have.
    """
    hosts = dict(_read(hostfile))
    if include and exclude:
        raise UserError("--include and --exclude: give one of them")
    chosen = dict(_named(include or exclude, hosts, hostfile))
    if exclude:
        hosts = {host: tuple(s for s in slots if s not in chosen.get(host, ())) for host, slots in hosts.items()}
    elif include:
        hosts = {host: chosen[host] for host in hosts if host in chosen}
    hosts = {host: slots for host, slots in hosts.items() if slots}
    if not hosts:
        raise UserError(f"{hostfile}: no slot is left; look at --include and --exclude")
    return Placement(hosts, hostfile, further)


def _read(hostfile: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    try:
        lines = hostfile.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{hostfile}: cannot read ({getattr(error, 'strerror', error)}); check --hostfile") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _HOST.match(line.strip())
        if match is None:
            raise UserError(f"{hostfile}:{number}: {line.strip()!r}: write `host slots=8`")
        yield match[1], tuple(range(int(match[2])))


def _named(text: str, hosts: dict[str, tuple[int, ...]], hostfile: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part in filter(None, text.split("@")):
        host, _, slots = part.partition(":")
        if host not in hosts or not re.fullmatch(r"(\d+(,\d+)*)?", slots):
            raise UserError(f"{part!r}: write host:0,1@other, with hosts of {hostfile}: {', '.join(hosts)}")
        numbers = tuple(sorted(map(int, slots.split(",")))) if slots else hosts[host]
        if missing := set(numbers) - set(hosts[host]):
            raise UserError(f"{part!r}: {hostfile} gives {host} no slot {min(missing)}")
        yield host, numbers
