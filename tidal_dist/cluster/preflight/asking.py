"""Asks hosts, side by side: who is there, what is there, who sees the same files."""

import json
import secrets
import shlex
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidal_dist.cluster.preflight.machines import Clock
from tidal_dist.cluster.preflight.rows import Row, usual
from tidal_dist.cluster.transport import Result, Transport, run_on_all

REACH_SECONDS, LOOK_SECONDS, FIND_SECONDS = 20.0, 75.0, 20.0
_NODE = Path(__file__).parent / "node.py"
_WITNESSES = 3  # hosts that leave a file for the others
_NO_FOLDER = 81
_THERE = f'cd "$1" || exit {_NO_FOLDER}; shift; exec env "$@"'
_CLOCK = "import sys, time; print('%r %d.%d.%d' % ((time.time(),) + tuple(sys.version_info[:3])))"


@dataclass
class Asked:
    """What hosts have answered, by host; those that failed are in `rows` alone."""

    rows: list[Row] = field(default_factory=list)
    clocks: dict[str, Clock] = field(default_factory=dict)
    pythons: dict[str, str] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    seen: dict[str, list[str]] = field(default_factory=dict)


class _Watched:
    """A transport that notes when each host was asked, by our clock."""

    def __init__(self, transport: Transport):
        self._transport, self._lock = transport, threading.Lock()
        self.began: dict[str, float] = {}

    def run(self, host: str, command: Sequence[str], *, stdin: str = "", timeout: float) -> Result:
        """As the transport."""
        with self._lock:
            self.began[host] = time.time()
        return self._transport.run(host, command, stdin=stdin, timeout=timeout)


@dataclass(frozen=True)
class _WithOwnWord:
    """A transport that gives each host a last word of its own."""

    transport: Transport
    words: Mapping[str, str]

    def run(self, host: str, command: Sequence[str], *, stdin: str = "", timeout: float) -> Result:
        """As the transport."""
        return self.transport.run(host, [*command, self.words[host]], stdin=stdin, timeout=timeout)


def reach(transport: Transport, hosts: Sequence[str], at_once: int) -> Asked:
    """Who is there: ssh, Python, clock."""
    asked, watched = Asked(), _Watched(transport)
    for result in run_on_all(watched, hosts, [sys.executable, "-c", _CLOCK], timeout=REACH_SECONDS, at_once=at_once):
        host = result.host
        if result.problem:
            asked.rows.append(problem_row(host, "ssh", result.problem))
            continue
        asked.rows.append(Row(host, "ssh", "ok", f"{result.seconds:.1f} s"))
        try:
            clock, asked.pythons[host] = result.out.split()
        except ValueError:
            asked.rows.append(_no_python(result))
            continue
        middle = watched.began[host] + result.seconds / 2
        asked.clocks[host] = Clock(float(clock) - middle, result.seconds / 2)
    return asked


def problem_row(host: str, check: str, problem: str) -> Row:
    """A problem in one line, its remedy behind the first semicolon."""
    what, _, remedy = problem.partition("; ")
    return Row(host, check, "fail", what, remedy)


def _no_python(result: Result) -> Row:
    said = (result.err.strip().splitlines() or [f"exit code {result.code}"])[-1]
    remedy = f"install Python and the same packages there, at the same path as here: {sys.executable}"
    return Row(result.host, "python", "fail", f"{sys.executable} does not start ({said})", remedy)


def there(folder: str, environment: Mapping[str, str], command: Sequence[str]) -> list[str]:
    """A command in a folder, with an environment, as ranks have it."""
    return ["sh", "-c", _THERE, "sh", folder, *(f"{name}={value}" for name, value in environment.items()), *command]


def look(
    transport: Transport,
    hosts: Sequence[str],
    request: Mapping[str, Any],
    place: tuple[str, Mapping[str, str]],
    asked: Asked,
    at_once: int,
) -> None:
    """What is there.

    Args:
        request: of `node.look`; its `reads` is a function of the host's number. place: folder and environment.
    """
    run_id = secrets.token_hex(4)
    tokens = {host: f".preflight-{run_id}-{n}" for n, host in enumerate(hosts[:_WITNESSES]) if len(hosts) > 1}

    own = {
        host: json.dumps({**request, "reads": [*request["reads"](number)], "token": tokens.get(host)})
        for number, host in enumerate(hosts)
    }
    source = _NODE.read_text("utf-8")
    each = _WithOwnWord(transport, own)
    try:
        command = there(*place, [sys.executable, "-", "look"])
        for result in run_on_all(each, hosts, command, stdin=source, timeout=LOOK_SECONDS, at_once=at_once):
            row = _lost(result, place[0])
            if row:
                asked.rows.append(row)
            else:
                asked.facts[result.host] = json.loads(result.out.splitlines()[-1])
        if tokens and asked.facts:
            _look_for_tokens(transport, tokens, asked, at_once)
    finally:
        # Also what a host has left that was lost since, and where somebody has pressed Ctrl-C.
        command = there(*place, [sys.executable, "-", "forget", request["run_dir"], *tokens.values()])
        run_on_all(transport, list(tokens), command, stdin=source, timeout=FIND_SECONDS, at_once=at_once)


def _lost(result: Result, folder: str) -> Row | None:
    """Why there is no answer, if there is none."""
    doing = [line.removeprefix("doing ") for line in result.err.splitlines() if line.startswith("doing ")]
    if result.problem:
        row = problem_row(result.host, "probe", result.problem)
        return Row(row.host, row.check, row.status, f"{row.what} (at {doing[-1]})", row.remedy) if doing else row
    if result.code == _NO_FOLDER:
        remedy = "have the project in the same folder on all hosts"
        return Row(result.host, "project", "fail", f"no folder {folder}, where ranks would start", remedy)
    try:
        json.loads(result.out.splitlines()[-1])["reads"]
        return None
    except (ValueError, LookupError, TypeError):
        said = [line for line in result.err.splitlines() if line.strip() and not line.startswith("doing ")]
        what = f"the probe ended with code {result.code}" + (f" ({said[-1].strip()})" if said else "")
        what += f" at {doing[-1]}" if doing else ""
        return Row(result.host, "probe", "fail", what, f"try `ssh {result.host} {shlex.quote(sys.executable)} -V`")


def _look_for_tokens(transport: Transport, tokens: dict[str, str], asked: Asked, at_once: int) -> None:
    """Have all hosts look for the files that some left in the run folder."""
    left = {host: tokens[host] for host in tokens if host in asked.facts}
    folder = usual({host: fact["run_folder"]["folder"] for host, fact in asked.facts.items()})
    source, hosts = _NODE.read_text("utf-8"), list(asked.facts)
    command = [sys.executable, "-", "find", folder, *left.values()]
    for result in run_on_all(transport, hosts, command, stdin=source, timeout=FIND_SECONDS, at_once=at_once):
        if result.problem:
            asked.rows.append(problem_row(result.host, "probe", result.problem))
        elif result.code == 0:
            asked.seen[result.host] = json.loads(result.out.splitlines()[-1])["seen"]
