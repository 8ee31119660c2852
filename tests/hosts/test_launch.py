"""`tidal launch` on two hosts, with the deepspeed launcher and pdsh: a rank is killed, a host goes, the run goes on."""

import re
import signal
import time
from pathlib import Path

import pytest

from tests.hosts.cluster import Cluster
from tests.hosts.launches import PATIENCE, launch
from tests.launching import prepare_sums, started
from tests.ranks import halt
from tidal_dist.drill.evidence import recorded_losses
from tidal_dist.history.events import read_events

pytestmark = pytest.mark.slow
# Sums of several threads may differ in the last digit.
OVERRIDES = ("training.threads_per_rank=1", "training.steps=4000", "training.save_every_steps=10")
OVERRIDES += ("validation.every_steps=1000",)
TOGETHER = 20  # the checkpoint from which one rank goes on


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_sums(tmp_path_factory.mktemp("sums"))


def test_a_rank_is_killed_then_a_host_is_gone_and_the_run_goes_on_until_it_is_stopped(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "two" / "run"
    with launch(cluster, config, run, "--pause", "0.1", *OVERRIDES) as two:
        two.wait_for("step 12", lambda: two.beat(1)["step"] >= 12)
        started = two.beat(0)["started"]
        # The rank on alpha hangs as in a collective of NCCL, which does not notice that the other one is gone.
        halt(two.ranks("alpha")[0].pid)
        two.ranks("beta")[0].kill()
        two.wait_for("all down", two.are_down)
        two.wait_for("a next step", lambda: two.beat(0)["started"] != started and two.beat(0)["step"] > 10)
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
