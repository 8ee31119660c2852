"""What the pods of Kubernetes run, as two processes of this host: one is told to go, and what both leave goes on."""

import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launching import ROOT, environment, launched, prepare_sums
from tidal_dist.cluster.recipes import MASTER_PORT, Recipe, Volume, job
from tidal_dist.config import load_config
from tidal_dist.history.events import read_events
from tidal_dist.launching import free_port
from tidal_dist.training.heartbeat import heartbeat_file

pytestmark = pytest.mark.slow

OVERRIDES = ("training.steps=100000", "training.save_every_steps=100000", "validation.every_steps=100000")
UNFINISHED = 3


def pods(config: Path) -> list["subprocess.Popen[bytes]"]:
    """The pods of a job of two nodes, each of which has one rank; their output is in files beside the configuration."""
    recipe = Recipe(str(config), OVERRIDES, nodes=2, gpus=0, folder=str(ROOT), volumes=(Volume("all", "/"),))
    _, rendered = job(recipe, load_config(config, OVERRIDES))
    (container,) = rendered["spec"]["template"]["spec"]["containers"]
    *shell, script = container["command"]
    hostfile = f"{shlex.quote(str(config.parent))}/hostfile-$JOB_COMPLETION_INDEX"
    for name, here in {"/tmp/hostfile": hostfile, "tidal-0.tidal": "127.0.0.1", str(MASTER_PORT): free_port()}.items():
        assert name in script
        script = script.replace(name, str(here))
    variables = {v["name"]: v["value"].replace("eth0", "lo") for v in container["env"]}
    variables |= {"PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    started = []
    for index in range(2):
        of_pod = environment() | variables | {"JOB_COMPLETION_INDEX": str(index)}
        with open(config.parent / f"pod-{index}", "ab") as output:
            started.append(
                subprocess.Popen([*shell, script], cwd=ROOT, env=of_pod, stdout=output, stderr=subprocess.STDOUT)
            )
    return started


def codes(config: Path, started: list["subprocess.Popen[bytes]"]) -> list[int]:
    """How the pods end; their output where they do not."""
    try:
        return [pod.wait(timeout=120) for pod in started]
    except subprocess.TimeoutExpired:
        pytest.fail("\n".join((config.parent / f"pod-{i}").read_text()[-2000:] for i in range(2)))
    finally:
        for pod in started:
            while pod.poll() is None:
                pod.send_signal(signal.SIGTERM)  # the third one kills everything
                time.sleep(0.5)


def test_a_pod_that_must_go_leaves_a_checkpoint_and_the_job_goes_on(tmp_path: Path) -> None:
    config, run = prepare_sums(tmp_path), tmp_path / "run"
    started = pods(config)
    beat = heartbeat_file(run, 1)
    while not (beat.exists() and json.loads(beat.read_bytes())["step"] > 2):
        assert [pod.poll() for pod in started] == [None, None], (tmp_path / "pod-0").read_text()[-2000:]
        time.sleep(0.02)
    started[1].send_signal(signal.SIGTERM)  # as its node does that is drained
    assert codes(config, started) == [UNFINISHED, UNFINISHED]
    stop = read_events(run)[-1]
    assert (stop["event"], stop["reason"]) == ("stop", "SIGTERM")
    assert stop["step"] > 2
    # That pods which start again resume, tests of the supervisor show.
    launched(config, "--resume", *OVERRIDES[1:], f"training.steps={stop['step'] + 2}")
    steps = [event["step"] for event in read_events(run) if event["event"] in ("resume", "finish")]
    assert steps == [stop["step"], stop["step"] + 2]
