"""Ranks that are lost: the others end with one line, in time, and leave a record of their collectives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT, environment, prepare_sums, tidal_here
from tidal_dist.launching import free_port
from tidal_dist.training.heartbeat import HEARTBEATS, heartbeat_file

pytestmark = pytest.mark.slow

# What launch/train.py does, with a run of nothing but exchanges, in which rank 1 falls asleep or dies.
RANK = """
import sys, time, os
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
sys.argv = ["train.py", "--config", sys.argv[1], "training.collective_timeout_minutes={minutes}"]
from launch.train import main
code = main()
os._exit(code)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_sums(tmp_path_factory.mktemp("lost"))


@pytest.mark.parametrize("dies", [False, True])
def test_lost_ranks_end_in_one_line(config: Path, dies: bool) -> None:
    run = config.parent / "run"
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    # A rank that sleeps is waited for; the time must suffice for the start of both.
    code = RANK.format(dies=dies, minutes=1 if dies else 0.25)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(config)],
            env=environment() | variables | {"RANK": str(r), "LOCAL_RANK": str(r)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(2)
    ]
    try:
        output, _ = ranks[0].communicate(timeout=100)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
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
