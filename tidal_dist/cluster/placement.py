"""Which slots of which hosts hold the ranks of a launch, and where fewer ranks would stand."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.ordering import Share
from tidal_dist.cluster.hostfile import filter_hosts, read_hostfile
from tidal_dist.config import Config
from tidal_dist.launching import local_ranks


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

    def on(self, names: Collection[str]) -> "Placement":
        """Those of these hosts."""
        return replace(self, hosts={name: slots for name, slots in self.hosts.items() if name in names})

    def most(self, fits: Callable[[int], bool]) -> "Placement | None":
        """All of these ranks where they fit, else the most that do; none: there are none."""
        return self if self.ranks and fits(self.ranks) else self.another(fits)

    def host_of(self, rank: int) -> str:
        """Where a rank is."""
        return [name for name, slots in self.hosts.items() for _ in slots][rank]

    def another(self, fits: Callable[[int], bool]) -> "Placement | None":
        """The most ranks below this number that `fits` and can be placed; none: there are none."""
        placed = (self.with_ranks(n) for n in range(self.ranks - 1, 0, -1) if fits(n))
        return next((placement for placement in placed if placement), None)


def share_of(config: Config, ranks: int) -> Share:
    """How the first of so many ranks shares a step; its `check` says whether they fit."""
    return Share(config.training.batch_rows, config.training.accumulation_steps, 0, ranks)


def fits(config: Config, ranks: int) -> bool:
    """Whether lanes and rows of a step can be dealt out to so many ranks."""
    try:
        share_of(config, ranks).check(config.data.lanes)
    except UserError:
        return False
    return True


def on_this_machine(ranks: int, further: tuple[str, ...] = ()) -> Placement:
    """So many ranks here."""
    return Placement({"localhost": tuple(range(ranks))}, None, further)


def on_hosts(hostfile: Path, include: str, exclude: str, further: tuple[str, ...]) -> Placement:
    """All slots of a hostfile (`host slots=8` a line), or those that `include` names, or all but those of `exclude`.

    Args:
        include, exclude: as the deepspeed launcher has them: `host:0,1@other`; "": nothing.

    Raises:
        UserError: of `read_hostfile` or `filter_hosts`.
    """
    hosts = filter_hosts(read_hostfile(hostfile), include, exclude)
    return Placement({host.name: host.numbers for host in hosts}, hostfile, further)
