"""Which rank has ended, from what launchers and ranks say; the others then wait for it, or end since it is gone."""

import re
import signal
from dataclasses import dataclass
from pathlib import Path

from tidal_dist.cluster.logs import LOGS, last_lines
from tidal_dist.cluster.placement import Placement
from tidal_dist.training.interrupts import SIBLING_GONE

_SHOWN_LINES = 15
_NEGATIVE = 192
# What a rank says that has ended only since another one has.
_CONSEQUENCES = (SIBLING_GONE, "lost contact (")


@dataclass(frozen=True)
class Death:
    """The end of a rank, or of contact with it.

    Attributes:
        host: as the hostfile or the launcher calls it; none: it is not told. rank: none: some rank of the host.
        code: as a shell has it, negative for a signal; none: it is not told. text: what else is known.
    """

    host: str | None = None
    rank: int | None = None
    code: int | None = None
    text: str = ""


_SIGNS = (
    # The launcher on each host, behind the name that pdsh puts in front. Its command line is that of another rank.
    re.compile(r"^(?:(?P<host>[^\s:]+): )?\[.*\blaunch\.py:.* exits with return code = (?P<code>-?\d+)"),
    re.compile(r"^pdsh@\S+: (?P<host>\S+): (?P<text>ssh exited with exit code 255)"),
    re.compile(r"^pdsh@\S+: (?P<host>\S+): ssh exited with exit code (?P<code>\d+)"),
    re.compile(r"^srun: error: (?P<host>\S+): tasks? (?P<rank>\d+)\S*: (?P<text>.*?(?:exit code (?P<code>\d+))?)$"),
    re.compile(r"process rank (?P<rank>\d+) with PID \d+ on node (?P<host>\S+) exited on signal (?P<signal>\d+)"),
)


def death_in(line: str) -> Death | None:
    """What a line of a launcher's output tells."""
    match = next((found for sign in _SIGNS if (found := sign.search(line))), None)
    if match is None:
        return None
    told = match.groupdict()
    rank, code = (int(told[name]) if told.get(name) else None for name in ("rank", "code"))
    if code is not None and code > _NEGATIVE:
        code -= 256  # launch.py's own exit code is the rank's, and a signal's is negative
    if told.get("signal"):
        code = -int(told["signal"])
    text = f"is lost ({told['text']})" if told.get("text") else ""
    return None if code == 0 else Death(told.get("host"), rank, code, text)


def culprit(found: list[Death], placement: Placement, run: Path) -> tuple[Death, int | None]:
    """The death that the others follow from, and whose it is; none: it is not known."""
    suspects: list[tuple[Death, int | None]] = [(d, rank) for d in found for rank in _candidates(d, placement)]
    own = [(death, rank) for death, rank in suspects if rank is not None and not _is_consequence(run, rank)]
    # Where several are left, the launcher has ended those that said nothing, and the one that was killed is among them.
    return (own or suspects or [(found[0], None)])[0]


def _candidates(death: Death, placement: Placement) -> list[int]:
    if death.rank is not None:
        return [death.rank]
    hosts = list(placement.hosts)
    named = [host for host in hosts if death.host and _is_same(host, death.host)]
    return [rank for rank in range(placement.ranks) if placement.host_of(rank) in (named or hosts)]


def _is_same(one: str, other: str) -> bool:
    """Whether two names are of one host; some launchers leave its domain out."""
    short = one.partition(".")[0]
    return one == other or (not short.isdigit() and short == other.partition(".")[0])


def _is_consequence(run: Path, rank: int) -> bool:
    lines = _last_lines(run, rank)[1]
    return any(sign in line for line in lines for sign in _CONSEQUENCES)


def _last_lines(run: Path, rank: int) -> tuple[Path | None, list[str]]:
    logs = sorted((run / LOGS).glob(f"rank-{rank:05d}-*.log"), key=lambda path: path.stat().st_mtime)
    return (logs[-1], last_lines(logs[-1], _SHOWN_LINES)) if logs else (None, [])


def account(found: list[Death], placement: Placement, run: Path) -> list[str]:
    """What has happened, for people: which rank, where, how, and its last lines."""
    death, rank = culprit(found, placement, run)
    host = placement.host_of(rank) if rank is not None else death.host
    who = f"rank {rank} on {host}" if rank is not None else f"a rank on {host}"
    path, lines = _last_lines(run, rank) if rank is not None else (None, [])
    end = f"; its last lines ({path}):" if lines else ""
    what = how(death)
    if death.rank is None and (death.code or 0) > 0 and len(_candidates(death, placement)) > 1:
        what = f"has ended (the launcher there: a rank {what})"  # it tells one code, perhaps of another rank
    return [f"{who} {what}{end}", *(f"  | {line}" for line in lines)]


def how(death: Death) -> str:
    """The end, for people: `was killed by SIGKILL`."""
    code = death.code
    if code is None:
        return death.text or "has ended"
    if code < 0 or 128 < code < 128 + signal.NSIG:
        number = -code if code < 0 else code - 128
        why = " (out of memory, or killed by hand)" if number == signal.SIGKILL else ""
        return f"was killed by {_name(number)}{why}"
    return f"ended with exit code {code}"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
