"""A rehearsal and a soak of real ranks, killed for real."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pytest

from tests.launching import prepare_sums, tidal_here
from tests.warm import WarmLaunch
from tidal_dist.drill import rehearsal
from tidal_dist.drill import soak as soaking
from tidal_dist.launching import Launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # half a dozen launches each


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_sums(tmp_path_factory.mktemp("sums"))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Of a rehearsal: the one that is killed is as users start it, the others take seconds less."""
    found: list[Launch] = []

    def launch(command: Sequence[str], output: IO[str]) -> Launch:
        is_killed = "--resume" not in command and any(a.endswith("/killed") for a in command)
        found.append((Launch if is_killed else WarmLaunch)(command, output))
        return found[-1]

    monkeypatch.setattr(rehearsal, "Launch", launch)
    return found


def test_a_rehearsal_finds_that_a_good_job_can_be_started(config: Path, launches: list[Launch]) -> None:
    before = sorted(config.parent.iterdir())
    result = tidal_here("drill", config, "--ranks", "2", "--seed", "3", "--json")
    report = json.loads(result.stdout)
    assert report["go"], report
    assert [type(launch) for launch in launches] == [WarmLaunch, Launch, WarmLaunch, WarmLaunch]
    assert result.returncode == 0
    assert list(report["parts"]) == ["undisturbed", "killed", "resumed", "elsewhere", "exported", "probed"]
    assert all(check["holds"] for check in report["checks"])
    compared = [check["what"] for check in report["checks"]]
    assert re.fullmatch(r"SIGKILL of rank [01] after step \d+", compared[1])
    assert "resumed on 2 ranks: weights, optimizer" in compared
    assert "resumed on 1 ranks: rolling hash" in compared
    assert b"seed 3" in result.stderr
    assert sorted(config.parent.iterdir()) == before  # its own folder is gone, and the real run's was not made


@pytest.mark.usefixtures("launches")
def test_a_rehearsal_names_what_stops_the_job(config: Path) -> None:
    overrides = ["deepspeed={gradient_clipping: 5.0}", f"run_dir={config.parent / 'bad'}"]
    result = tidal_here("drill", config, *overrides, "--ranks", "1")
    lines = result.stdout.decode().splitlines()
    assert result.returncode == 1
    assert lines[-1] == "NO-GO"
    assert "error: deepspeed.gradient_clipping=5.0 contradicts" in result.stdout.decode()
    (folder,) = config.parent.glob("bad-drill-*")
    assert str(folder) in lines[-2]
    assert "contradicts" in (folder / "undisturbed.log").read_text()


def test_a_run_killed_five_times_is_the_undisturbed_run(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soaking, "Launch", WarmLaunch)
    overrides = ["model.dropout=0.1", "validation.every_steps=8"]
    plan = soaking.Plan(str(config), overrides, tmp_path, kills=5, seed=2)
    report = soaking.soak(plan, print)
    assert report.holds, report.as_text()
    assert len(report.kills) == 5
    assert {"rolling hash", "loss of every step", "weights and optimizer"} == set(report.checks)
