"""`tidal launch` on two hosts, with the deepspeed launcher and pdsh: a rank is killed, a host goes, the run goes on."""

import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.hosts.cluster import Cluster
from tests.launching import prepare_sums, started
from tidal_dist.drill.evidence import recorded_losses
from tidal_dist.history.events import read_events
from tidal_dist.launching import TRAIN

pytestmark = pytest.mark.slow
# Sums of several threads may differ in the last digit.
OVERRIDES = ("training.threads_per_rank=1", "training.steps=4000", "training.save_every_steps=10")
OVERRIDES += ("validation.every_steps=1000",)
TOGETHER = 20  # the checkpoint from which one rank goes on
PATIENCE = 120.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_sums(tmp_path_factory.mktemp("sums"))


class Launched:
    """A `tidal launch` on alpha, from where it reaches both hosts."""

    def __init__(self, cluster: Cluster, config: Path, run: Path, *overrides: str):
        self.cluster, self.run = cluster, run
        command = [sys.executable, "-m", "tidal_dist.cli", "launch", config, "--hostfile", cluster.hostfile()]
        command += ["--pause", "0.1", f"run_dir={run}", *OVERRIDES, *overrides]
        run.parent.mkdir(exist_ok=True)
        self.said = run.parent / "said"
        with open(self.said, "w") as file:
            self.process = cluster.popen("alpha", command, stdout=file, stderr=file)

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
def launch(cluster: Cluster, config: Path, run: Path, *overrides: str) -> Iterator[Launched]:
    launched = Launched(cluster, config, run, *overrides)
    try:
        yield launched
    finally:
        launched.process.kill()
        launched.process.wait()


def test_a_rank_is_killed_then_a_host_is_gone_and_the_run_goes_on_until_it_is_stopped(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "two" / "run"
    with launch(cluster, config, run) as two:
        two.wait_for("step 12", lambda: two.beat(1)["step"] >= 12)
        started = two.beat(0)["started"]
        # The rank on alpha hangs as in a collective of NCCL, which does not notice that the other one is gone.
        two.ranks("alpha")[0].suspend()
        two.ranks("beta")[0].kill()
        killed = time.monotonic()
        two.wait_for("all down", lambda: not (two.of_launcher("alpha") or two.of_launcher("beta")))
        assert time.monotonic() - killed < 10
        two.wait_for("a next step", lambda: two.beat(0)["started"] != started and two.beat(0)["step"] > 10)
        assert time.monotonic() - killed < 60
        two.wait_for("a checkpoint of two ranks", (run / "checkpoints" / f"step-{TOGETHER:08d}").exists)
        cluster.stop_sshd("beta")
        for process in two.of_launcher("beta"):
            process.kill()
        two.wait_for("a step of one rank", lambda: two.beat(0).get("world") == 1 and two.beat(0)["step"] > TOGETHER)
        two.process.send_signal(signal.SIGTERM)
        assert two.process.wait(PATIENCE) == 0, two.said.read_text()
        assert not two.of_launcher("alpha")
    said = two.said.read_text()
    assert re.search(r"^supervise: they meet at 10\.\S+, port \d+ by eth0: beta reached it$", said, re.M)
    assert re.search(r"^supervise: rank 1 on beta was killed by SIGKILL .*its last lines \(\S+rank-00001-", said, re.M)
    assert "supervise: left out: beta: refuses the connection" in said
    assert "supervise: going on with 1 of 2 hosts" in said
    assert next((run / "logs").glob("rank-00001-*.log")).read_text().count("=== ") == 2
    events = read_events(run)
    kinds = [e["event"] for e in events if e["event"] in ("start", "resume", "stop")]
    assert kinds == ["start", "resume", "resume", "stop"]
    assert (run / "checkpoints" / f"step-{events[-1]['step']:08d}" / "COMMIT").exists()
    _assert_losses_are_those_of_one_host(config, tmp_path / "one", run)


def _assert_losses_are_those_of_one_host(config: Path, folder: Path, run: Path) -> None:
    with started(config, f"run_dir={folder}", *OVERRIDES) as process:
        while len(recorded_losses(folder)) < TOGETHER:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
    expected = {step: loss for step, loss in recorded_losses(folder).items() if step <= TOGETHER}
    assert {step: loss for step, loss in recorded_losses(run).items() if step <= TOGETHER} == expected
