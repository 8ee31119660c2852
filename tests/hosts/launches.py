"""A `tidal launch` on the first of the hosts, as a test or a benchmark watches it."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.hosts.cluster import Cluster
from tidal_dist.launching import TRAIN

PATIENCE = 120.0


class Launched:
    """A `tidal launch` on the first host, from where it reaches all; `arguments`: options, then overrides."""

    def __init__(self, cluster: Cluster, config: Path, run: Path, *arguments: str):
        self.cluster, self.run, first = cluster, run, cluster.hosts[0]
        command = [sys.executable, "-m", "tidal_dist.cli", "launch", config, "--hostfile", cluster.hostfile()]
        command += [*arguments, f"run_dir={run}"]
        run.parent.mkdir(exist_ok=True)
        self.said = run.parent / "said"
        with open(self.said, "w") as file:
            self.process = cluster.popen(first, command, stdout=file, stderr=file)

    def beat(self, rank: int) -> dict:
        try:
            return json.loads((self.run / "heartbeats" / f"rank-{rank:05d}.json").read_text())
        except (OSError, ValueError):
            return {"step": 0, "started": 0.0}

    def wait_for(self, what: str, is_so: Callable[[], bool]) -> float:
        """Seconds that passed until it was so."""
        began = time.monotonic()
        while not is_so():
            assert time.monotonic() < began + PATIENCE, f"{what}: {self.said.read_text()}"
            assert self.process.poll() is None, f"{what}: {self.said.read_text()}"
            time.sleep(0.02)
        return time.monotonic() - began

    def are_down(self) -> bool:
        """Whether nothing of the launch is left on any host, but `tidal launch`."""
        return not any(map(self.of_launcher, self.cluster.hosts))

    def of_launcher(self, host: str) -> list[psutil.Process]:
        """Ranks and launchers on a host, without `tidal launch` itself and the writers of logs."""
        found = []
        for process in self.cluster.processes(host):
            try:
                line = process.cmdline()
            except psutil.NoSuchProcess:
                continue
            if any(word in line for word in (str(TRAIN), "deepspeed.launcher.launch", "pdsh")):
                found.append(process)
        return found

    def ranks(self, host: str) -> list[psutil.Process]:
        return [p for p in self.of_launcher(host) if str(TRAIN) in p.cmdline()[1:3]]


@contextmanager
def launch(cluster: Cluster, config: Path, run: Path, *arguments: str) -> Iterator[Launched]:
    launched = Launched(cluster, config, run, *arguments)
    try:
        yield launched
    finally:
        launched.process.kill()
        launched.process.wait()
