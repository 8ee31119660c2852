"""Ranks that are lost: the others end with one line, in time, and leave a record of their collectives."""

import json
from pathlib import Path

import pytest

from tests.launching import environment, prepare_sums, tidal_here
from tests.warm import Training
from tidal_dist.launching import free_port
from tidal_dist.training.heartbeat import HEARTBEATS, heartbeat_file

pytestmark = pytest.mark.slow

# What launch/train.py does, with a run of nothing but exchanges, in which rank 1 falls asleep or dies.
RANK = """
import sys, time, os
os.environ |= {variables}
from tidal_dist.config import load_config
from tidal_dist.training import engine as ds, start
def exchange(config, resume, manifest, tokenizer, share, watch):
    watch.heartbeat.step(1)
    for step in range(1, 100):
        watch.heartbeat.step(step)
        if share[0] == 1 and step == 3:
            os._exit(5) if {dies} else time.sleep(100)
        with watch.phases("agree"):
            watch.meeting.any_rank()
start._train = exchange
from launch.train import main
os._exit(main())
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_sums(tmp_path_factory.mktemp("lost"))


@pytest.mark.parametrize("dies", [False, True])
def test_lost_ranks_end_in_one_line(config: Path, dies: bool, tmp_path: Path) -> None:
    run, port, ranks = config.parent / "run", free_port(), []
    # A rank that sleeps is waited for; the time must suffice for the start of both.
    arguments = ["--config", str(config), f"training.collective_timeout_minutes={1 if dies else 0.25}"]
    # Each by itself: nobody but the network tells one of the other's end.
    for rank in range(2):
        variables = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        script = tmp_path / f"rank-{rank}.py"
        script.write_text(RANK.format(dies=dies, variables=variables))
        ranks.append(Training(script, arguments, 1, port, environment()))
    try:
        output, _ = ranks[0].communicate(timeout=100)
    finally:
        for process in ranks:
            process.kill()
    assert ranks[0].returncode == 1, output
    assert "Traceback" not in output
    [line] = [line for line in output.splitlines() if line.startswith("error:")]
    assert line.startswith("error: rank 0 on ")
    assert ", agree of step 4: lost contact (" in line
    assert f"`tidal diagnose {run}` says with whom" in line
    assert json.loads(heartbeat_file(run, 0).read_bytes())["ended"].startswith("lost ranks: ")
    record = json.loads((run / HEARTBEATS / "flight-00000.json").read_bytes())
    assert record["entries"]
    result = tidal_here("diagnose", run, "--json")
    report = json.loads(result.stdout)
    assert (result.returncode, report["status"], report["culprits"]) == (1, "dead", [1])
