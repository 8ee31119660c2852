"""Runs that are interrupted: by signals, in training and in validation, under `launch.supervise` and without."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launching import ROOT, environment, launched, prepare_sums, scalars, started, tidal_here
from tests.ranks import halt
from tidal_dist.drill.evidence import newest_step
from tidal_dist.history.events import read_events
from tidal_dist.launching import free_port
from tidal_dist.training.heartbeat import heartbeat_file

pytestmark = pytest.mark.slow

STEPS, VALIDATED = 24, 8  # a validation, which takes long, is still to come when a signal is sent after step 8
OVERRIDES = (
    f"training.steps={STEPS}",
    "training.save_every_steps=1000",
    f"validation.every_steps={VALIDATED}",
    # A model that has learnt little writes long nonsense, so that a signal meets its validation.
    "training.learning_rate=1e-5",
    "validation.max_bytes=60",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_sums(tmp_path_factory.mktemp("interrupted"))


@contextlib.contextmanager
def supervised(config: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "launch.supervise", "--config", str(config), "--num_gpus", "2"]
    process = subprocess.Popen(
        [*command, "--master_port", str(free_port()), "--", *overrides],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        for number in (signal.SIGTERM,) * 3:  # the third kills everything
            process.send_signal(number)
            time.sleep(0.5)
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    while not (found := condition()):
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.02)
    return found


def beat(run: Path, rank: int) -> dict[str, Any]:
    try:
        return json.loads(heartbeat_file(run, rank).read_bytes())
    except OSError:
        return {"phase": None, "pid": None, "step": 0, "ended": "not begun"}


def stopped_at(run: Path) -> int:
    last = read_events(run)[-1]
    assert last["event"] == "stop", last
    return last["step"]


def state(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_bytes())["provenance"]


def test_what_was_interrupted_goes_on_as_if_nothing_had_been(config: Path) -> None:
    straight, run = config.parent / "straight", config.parent / "interrupted"
    launched(config, *OVERRIDES, f"run_dir={straight}")

    # Slurm's warning comes to the supervisor, in the middle of a validation.
    with supervised(config, *OVERRIDES, f"run_dir={run}") as process:
        assert process.stdout
        before = []
        while f"step {VALIDATED}: loss" not in "".join(before[-1:]):
            before.append(process.stdout.readline())
            assert before[-1], "".join(before)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output[-3000:]
    assert stopped_at(run) == VALIDATED
    assert state(run, VALIDATED)["metrics"] == {}
    text = rf"stopped at step {VALIDATED} of {STEPS} \(SIGUSR1, rank [01]\): saved; go on with --resume"
    assert re.search(text, output)

    # One rank alone is told to end, while it trains.
    with started(config, *OVERRIDES, f"run_dir={run}", "--resume") as process:
        pid = wait_until(lambda: not beat(run, 1)["ended"] and beat(run, 1)["pid"], process)
        # Heartbeats are a second apart, in which such a run is over.
        wait_until(lambda: newest_step(run) > VALIDATED, process)
        os.kill(pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output[-3000:]
    step = stopped_at(run)
    assert VALIDATED < step < STEPS
    assert state(run, step)["step"] == step
    assert tidal_here("diagnose", run).stdout.decode().startswith(f"{run}: stopped\n")

    launched(config, *OVERRIDES, f"run_dir={run}", "--resume")
    assert read_events(run)[-1]["event"] == "finish"
    ours, theirs = (state(r, STEPS) for r in (run, straight))
    assert {k: v for k, v in ours.items() if k not in ("run", "config_hash")} == {
        k: v for k, v in theirs.items() if k not in ("run", "config_hash")
    }
    for name in ("train/loss", "validation/loss", "validation/exact_match"):
        assert scalars(run)[name] == scalars(straight)[name], name
    found = (json.loads((r / "checkpoints" / "best.json").read_bytes()) for r in (run, straight))
    assert next(found) == next(found)


def test_a_rank_that_stands_still_is_named_and_a_second_signal_ends_at_once(config: Path) -> None:
    run = config.parent / "halted"
    with started(config, f"run_dir={run}", "training.steps=100000", "validation.every_steps=100000") as process:
        first, second = (
            wait_until(lambda rank=rank: beat(run, rank)["step"] > 3 and beat(run, rank)["pid"], process)
            for rank in (0, 1)
        )
        halt(second)
        result = tidal_here("diagnose", run, "--json")
        report = json.loads(result.stdout)
        assert (result.returncode, report["status"], report["culprits"]) == (1, "hung", [1])
        assert f"(process {second}) was stopped by a signal (SIGSTOP)" in report["lines"][0]
        # The main thread of rank 0 waits in an exchange, so that it can neither ask nor save.
        os.kill(first, signal.SIGTERM)
        wait_until(lambda: beat(run, 0).get("stopping") == "SIGTERM" and beat(run, 0)["stack"], process)
        os.kill(first, signal.SIGTERM)
        os.kill(second, signal.SIGCONT)
        output, _ = process.communicate(timeout=250)
    assert process.returncode == 128 + signal.SIGTERM, output[-3000:]
    assert "rank 0: SIGTERM again: ended at once" in output
    result = tidal_here("diagnose", run, "--json")
    assert (result.returncode, json.loads(result.stdout)["status"]) == (1, "dead")
