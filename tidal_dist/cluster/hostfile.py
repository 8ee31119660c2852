"""The hosts of a job: a file with `host slots=8` a line, read strictly, and the choice among them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError

_LINE = re.compile(r"(\S+)\s+slots=(\d+)(\s+max[-_]slots=\d+)?(\s+#.*)?")


@dataclass(frozen=True)
class Host:
    """A host and how many ranks it may have.

    Attributes:
        slots: their number. chosen: which of the host's slots these are; (): the first ones.
    """

    name: str
    slots: int
    chosen: tuple[int, ...] = ()

    @property
    def numbers(self) -> tuple[int, ...]:
        """Its slots, by their number on the host."""
        return self.chosen or tuple(range(self.slots))


def host_of(name: str, numbers: Sequence[int]) -> Host:
    """A host with these of its slots; the first ones are written as a number alone."""
    are_first = list(numbers) == list(range(len(numbers)))
    return Host(name, len(numbers), () if are_first else tuple(numbers))


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file, in its order; empty lines and those that begin with # do not count.

    Raises:
        UserError: it is missing, unreadable or empty, or a line is wrong or names a host again.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read ({getattr(error, 'strerror', error)}); check --hostfile") from None
    hosts: dict[str, Host] = {}
    first_seen: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        host = _parsed(line, f"{path}:{number}")
        if host.name in hosts:
            raise UserError(
                f"{path}:{number}: {host.name} stands in line {first_seen[host.name]} already; "
                "give each host one line with all its slots"
            )
        hosts[host.name], first_seen[host.name] = host, number
    if not hosts:
        raise UserError(f"{path}: names no host; write `host slots=8`, one a line")
    return list(hosts.values())


def _parsed(line: str, where: str) -> Host:
    match = _LINE.fullmatch(line)
    if match is None:
        raise UserError(f"{where}: {line!r}: write `host slots=8`")
    if int(match[2]) == 0:
        raise UserError(f"{where}: {match[1]} has no slots; give it some, or take the line out")
    return Host(match[1], int(match[2]))


def filter_hosts(hosts: Sequence[Host], include: str, exclude: str) -> list[Host]:
    """All of the hosts, or the slots that `include` names, or all but those of `exclude`; in their order.

    Args:
        include, exclude: as the deepspeed launcher has them: `host:0,1@other`; "": nothing.

    Raises:
        UserError: both are given, hosts or slots are named that are not there, or none is left.
    """
    if include and exclude:
        raise UserError("--include and --exclude: give one of them")
    named: dict[str, set[int]] = {}
    for name, numbers in _named(include or exclude, {host.name: host for host in hosts}):
        named.setdefault(name, set()).update(numbers)
    if not named:
        return list(hosts)
    left = [(h.name, [n for n in h.numbers if (n in named.get(h.name, ())) != bool(exclude)]) for h in hosts]
    if not any(numbers for _, numbers in left):
        raise UserError("no slot is left; look at --include and --exclude")
    return [host_of(name, numbers) for name, numbers in left if numbers]


def _named(text: str, hosts: dict[str, Host]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part in filter(None, text.split("@")):
        name, _, slots = part.partition(":")
        if name not in hosts or not re.fullmatch(r"(\d+(,\d+)*)?", slots):
            raise UserError(f"{part!r}: write host:0,1@other, with hosts of the hostfile: {', '.join(hosts)}")
        numbers = tuple(map(int, slots.split(","))) if slots else hosts[name].numbers
        if missing := set(numbers) - set(hosts[name].numbers):
            raise UserError(f"{part!r}: the hostfile gives {name} no slot {min(missing)}")
        yield name, numbers


def hostfile_text(hosts: Sequence[Host]) -> str:
    """A hostfile that gives each host so many slots."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)
