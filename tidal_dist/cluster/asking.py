"""Has hosts do a task of `there.py`, all at once, and hands their answers back."""

import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidal_dist.cluster.transport import Result, Transport, run_on_all

_THERE = Path(__file__).parent / "there.py"


@dataclass(frozen=True)
class Answer:
    """What a host has answered.

    Attributes:
        found: what the task found; {} if there is a problem. problem: why there is no answer, in one line.
    """

    host: str
    found: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def ask(transport: Transport, hosts: Sequence[str], task: Sequence[object], timeout: float) -> list[Answer]:
    """The answers of hosts, in their order. task: name and arguments of a task of `there.py`. timeout: in seconds."""
    command = [sys.executable, "-", *map(str, task)]
    return [_answer(r) for r in run_on_all(transport, hosts, command, stdin=_THERE.read_text("utf-8"), timeout=timeout)]


def ask_each(transport: Transport, tasks: Mapping[str, Sequence[object]], timeout: float) -> list[Answer]:
    """The same with a task of its own for each host, all at the same time."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        found = [pool.submit(ask, transport, [host], task, timeout) for host, task in tasks.items()]
        return [answer for future in found for answer in future.result()]


def _answer(result: Result) -> Answer:
    if result.problem:
        return Answer(result.host, problem=f"{result.host}: {result.problem}")
    try:
        return Answer(result.host, json.loads(result.out.splitlines()[-1]))
    except (ValueError, IndexError):
        last = (result.err.strip().splitlines() or [f"exit code {result.code}"])[-1]
        problem = f"{result.host}: {sys.executable} does not do what it does here ({last}); install the same there"
        return Answer(result.host, problem=problem)
