"""A shard that goes bad while two real ranks train: a clean stop, or a run without it that can be repeated exactly."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from data_pipeline.ledger import Ledger
from data_pipeline.ordering import roll
from tests.launching import error_lines, launch, scalars, started, tidal_here
from tests.mixed_shards import SUMS, TIDES, prepare_mixed
from tidal_dist.history.log import ROLLING_HASH, read_log
from tidal_dist.history.past import open_run

pytestmark = pytest.mark.slow

BAD = f"train/{TIDES}-000001"
STEPS, BATCH, SAVED_EVERY = 64, 8, 14
MIX = [{"weights": {SUMS: 0.5, TIDES: 0.5}}, {"from_step": 45, "weights": {SUMS: 0.25, TIDES: 0.75}}]


class Finished(NamedTuple):
    """A run that has ended: its folder and its output."""

    run: Path
    process: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    training = {"steps": STEPS, "batch_rows": BATCH, "log_every_steps": 1, "save_every_steps": SAVED_EVERY}
    sections = {"data": {"mix": MIX, "workers": 1}, "monitor": {"pictures": False, "report": False}}
    path, _ = prepare_mixed(tmp_path_factory.mktemp("bad"), training=training, **sections)
    return path


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run's log has come to a step."""
    deadline = time.monotonic() + 120
    while not (lines := read_log(run)) or lines[-1].step < step:
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def with_a_shard_torn(config: Path, name: str, *overrides: str) -> Finished:
    """A run whose shard is cut short while it trains."""
    run, shards = config.parent / name, config.parent / f"{name}-shards"
    shutil.copytree(config.parent / "shards", shards)
    with started(config, f"run_dir={run}", f"data.shards={shards}", *overrides) as process:
        wait_for_step(run, 5, process)
        os.truncate(shards / f"{BAD}.tar", 1000)
        output, _ = process.communicate(timeout=120)
    return Finished(run, subprocess.CompletedProcess(process.args, process.returncode, output))


@pytest.fixture(scope="module")
def quarantined(config: Path) -> Finished:
    return with_a_shard_torn(config, "quarantined", "data.on_bad_shard=quarantine")


@pytest.fixture(scope="module")
def stopped(config: Path) -> Finished:
    return with_a_shard_torn(config, "stopped")


def the_record(run: Path) -> dict:
    (shard,) = json.loads((run / "quarantine.json").read_bytes())["shards"]
    return shard


def test_without_quarantine_all_ranks_stop_with_one_line(stopped: Finished) -> None:
    errors = error_lines(stopped.process.stdout)
    assert stopped.process.returncode == 2, stopped.process.stdout[-3000:]
    assert len(errors) == 1, stopped.process.stdout[-3000:]
    assert f"{BAD}.tar: " in errors[0]
    assert "data.on_bad_shard=quarantine" in errors[0]
    assert "Traceback" not in stopped.process.stdout
    assert not (stopped.run / "quarantine.json").exists()


@pytest.fixture(scope="module")
def resumed(config: Path, stopped: Finished) -> Path:
    """The folder of the run that stopped, which went on with the shard restored."""
    last = read_log(stopped.run)[-1].step
    assert 5 <= last < STEPS
    assert max(path.name for path in (stopped.run / "checkpoints").glob("step-*")) == f"step-{last:08d}"
    arguments = [f"run_dir={stopped.run}", f"data.shards={config.parent / 'shards'}"]
    process = launch(config, "--resume", *arguments)
    assert process.returncode == 0, process.stdout[-3000:]
    assert f"from step {last} of {STEPS}" in process.stdout
    assert f"data so far: {SUMS} " in process.stdout
    return stopped.run


def test_a_stop_loses_no_step(resumed: Path) -> None:
    """What was trained before the shard was needed is saved; with the shard restored the run goes on from there."""
    past, log = open_run(resumed), read_log(resumed)
    assert [line.step for line in log] == list(range(STEPS + 1))
    assert log[-1].rolling_hash == roll(past.start, past.order, range(STEPS * BATCH))


def test_a_quarantine_is_agreed_on_recorded_and_shown(quarantined: Finished) -> None:
    assert quarantined.process.returncode == 0, quarantined.process.stdout[-3000:]
    assert "Traceback" not in quarantined.process.stdout
    record = the_record(quarantined.run)
    assert record["name"] == BAD
    assert record["from_row"] % BATCH == 0
    step = record["from_row"] // BATCH + 1
    assert f"step {step}: left out {BAD} from row {record['from_row']} on: " in quarantined.process.stdout
    past, log = open_run(quarantined.run), read_log(quarantined.run)
    empty = [g for g in range(STEPS * BATCH) if past.order.locate(g).quarantined]
    assert record["from_row"] <= empty[0] < record["from_row"] + BATCH
    assert log[-1].rolling_hash == roll(past.start, past.order, range(STEPS * BATCH))
    shown = scalars(quarantined.run)
    assert set(shown["data/quarantined_shards"].values()) == {0.0, 1.0}
    assert shown["data/empty_rows"][STEPS] == len(empty)
    for use in Ledger(past.order).at(STEPS * BATCH):
        assert shown[f"data/{use.source}/rows"][STEPS] == use.rows
        assert shown[f"data/{use.source}/repeats"][STEPS] == use.repeats
        assert shown[f"data/{use.source}/epochs"][STEPS] == pytest.approx(use.epochs)
    state = json.loads((quarantined.run / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_bytes())
    assert state["provenance"]["quarantine"] == {BAD: record["from_row"]}
    assert state["provenance"]["rolling_hash"] == log[-1].rolling_hash


def test_a_replay_with_the_record_repeats_every_digit(config: Path, quarantined: Finished) -> None:
    """From the first step, with the shard restored; killed on the way and resumed."""
    run = config.parent / "replay"
    run.mkdir()
    shutil.copy(quarantined.run / "quarantine.json", run)
    with started(config, f"run_dir={run}") as process:
        wait_for_step(run, 2 * SAVED_EVERY + 5, process)
        os.killpg(process.pid, signal.SIGKILL)
    resumed = launch(config, "--resume", f"run_dir={run}")
    assert resumed.returncode == 0, resumed.stdout[-3000:]
    assert "left out" not in resumed.stdout  # the record says it already
    ours, theirs = scalars(run)["train/loss"], scalars(quarantined.run)["train/loss"]
    assert ours == theirs
    assert sorted(ours) == list(range(1, STEPS + 1))
    assert (run / ROLLING_HASH).read_bytes() == (quarantined.run / ROLLING_HASH).read_bytes()
    assert tidal_here("audit", run, quarantined.run).returncode == 0


def test_audit_finds_the_first_empty_row(quarantined: Finished, resumed: Path) -> None:
    """The stopped run read on with the shard restored, the other one without it."""
    result = tidal_here("audit", quarantined.run, resumed, "--json")
    report = json.loads(result.stdout)
    order = open_run(quarantined.run).order
    first_empty = next(g for g in range(STEPS * BATCH) if order.locate(g).quarantined)
    assert (result.returncode, report["same_rows"]) == (1, first_empty)
    assert report["first_different_step"] == [first_empty // BATCH + 1] * 2


def test_explain_knows_the_ranks(quarantined: Finished) -> None:
    step = the_record(quarantined.run)["from_row"] // BATCH + 1
    result = tidal_here(
        "explain", "--run", quarantined.run, "--step", str(step), "--json", "--data", quarantined.run.parent / "shards"
    )
    report = json.loads(result.stdout)
    assert report["ranks"] == 2
    assert [row["rank"] for row in report["rows"]] == [0, 1] * (BATCH // 2)
    assert {row["shard"] for row in report["rows"] if row["left_out"]} == {BAD}
