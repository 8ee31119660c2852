"""Hosts that are played: they answer what `tidal preflight` asks, some of them otherwise than the rest."""

import copy
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tidal_dist.cluster.transport import Result

Edit = Callable[[dict[str, Any]], object]
SHARED = "/shared/runs"


def gpu(index: int) -> dict[str, str]:
    """As nvidia-smi describes one."""
    return {
        "index": str(index),
        "name": "NVIDIA H100 80GB HBM3",
        "memory.total": "81559",
        "memory.used": "4",
        "driver_version": "570.86.15",
        "ecc.errors.uncorrected.volatile.total": "0",
        "clocks_throttle_reasons.active": "0x0000000000000001",
        "retired_pages.pending": "[N/A]",
    }


def facts(gpus: int = 0) -> dict[str, Any]:
    """What a host that is well says of itself."""
    return {
        "hostname": "node",
        "python": "3.11.7",
        "executable": sys.executable,
        "project": {"version": "0.1.0", "hash": "a" * 64, "place": "/project"},
        "packages": {"torch": "2.13.0", "deepspeed": "0.19.8", "numpy": "2.0.0", "triton": None},
        "environment": {"OMP_NUM_THREADS": "1"},
        "gpus": {"gpus": [gpu(n) for n in range(gpus)]},
        "memory_available": 1_000_000_000_000,
        "disks": {
            "run folder": {"folder": SHARED, "free": 10_000_000_000_000},
            "shared memory": {"folder": "/dev/shm", "free": 100_000_000_000},
        },
        "run_folder": {"folder": SHARED},
        "torch": {
            "version": "2.13.0",
            "cuda": "12.8" if gpus else None,
            "devices": gpus,
            "nccl": "2.27.3" if gpus else None,
        },
        "reads": {"config": "b" * 64, "shards": "c" * 64, "members": 8},
    }


@dataclass
class Played:
    """A transport to them.

    Attributes:
        edits: by host, what changes its facts. answers: by host and task, what comes back instead of an answer.
        clocks: seconds before ours. apart: hosts that do not see what the others write. seconds: that each task takes.
        most: hosts asked at the same time.
    """

    gpus: int = 0
    edits: dict[str, Edit] = field(default_factory=dict)
    answers: dict[tuple[str, str], Result] = field(default_factory=dict)
    clocks: dict[str, float] = field(default_factory=dict)
    pythons: dict[str, str] = field(default_factory=dict)
    apart: set[str] = field(default_factory=set)
    seconds: dict[str, float] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    most: int = 0
    _now: int = 0
    _written: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, host: str, command: Sequence[str], *, stdin: str = "", timeout: float) -> Result:
        del stdin, timeout
        began, words = time.monotonic(), list(command)
        # What follows the Python that is started.
        task = words[words.index(sys.executable) + 1 :]
        name = "clock" if task[0] == "-c" else task[1]
        with self._lock:
            self.asked.append((host, name))
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(self.seconds.get(name, 0.0))
        out = self._answer(host, name, task[2:])
        with self._lock:
            self._now -= 1
        return self.answers.get((host, name)) or Result(host, 0, out + "\n", "", time.monotonic() - began)

    def _answer(self, host: str, name: str, words: list[str]) -> str:
        if name == "clock":
            return f"{time.time() + self.clocks.get(host, 0.0)} {self.pythons.get(host, '3.11.7')}"
        if name == "look":
            token = json.loads(words[0])["token"]
            found = copy.deepcopy(facts(self.gpus))
            if token:
                self._written.add(token)
            self.edits.get(host, lambda _: None)(found)
            return json.dumps(found)
        if name == "find":
            seen = [] if host in self.apart else [token for token in words[1:] if token in self._written]
            return json.dumps({"seen": seen})
        if name == "forget":
            self._written -= set(words[1:])
            return "{}"
        address = f"10.0.{int(host.removeprefix('node')) // 256}.{int(host.removeprefix('node')) % 256}"
        own: dict[str, Any] = {"interfaces": {address: ["eth0", 10_000]}, "port": 29_777}
        return json.dumps({"addresses": own, "listen": {"heard": 1}, "reach": {"reached": {"10.0.0.0": address}}}[name])

    @property
    def left(self) -> set[str]:
        """Files that nobody has removed."""
        return self._written


def hostfile_text(hosts: int, slots: int = 1) -> str:
    """Of node0, node1, ..."""
    return "".join(f"node{n} slots={slots}\n" for n in range(hosts))
