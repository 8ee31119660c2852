"""A rehearsal and a soak as users start them: real launches, killed for real."""

import json
import re
from pathlib import Path

import pytest

from tests.launching import light_command, prepare_sums, tidal_here
from tidal_dist.drill.soak import Plan, soak

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # half a dozen launches each


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_sums(tmp_path_factory.mktemp("sums"))


def test_a_rehearsal_finds_that_a_good_job_can_be_started(config: Path) -> None:
    before = sorted(config.parent.iterdir())
    result = tidal_here("drill", config, "--ranks", "2", "--seed", "3", "--json")
    report = json.loads(result.stdout)
    assert report["go"], report
    assert result.returncode == 0
    assert list(report["parts"]) == ["undisturbed", "killed", "resumed", "elsewhere", "exported", "probed"]
    assert all(check["holds"] for check in report["checks"])
    compared = [check["what"] for check in report["checks"]]
    assert re.fullmatch(r"SIGKILL of rank [01] after step \d+", compared[1])
    assert "resumed on 2 ranks: weights, optimizer" in compared
    assert "resumed on 1 ranks: rolling hash" in compared
    assert b"seed 3" in result.stderr
    assert sorted(config.parent.iterdir()) == before  # its own folder is gone, and the real run's was not made


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


def test_a_run_killed_five_times_is_the_undisturbed_run(config: Path, tmp_path: Path) -> None:
    overrides = ["model.dropout=0.1", "validation.every_steps=8"]
    plan = Plan(str(config), overrides, tmp_path, kills=5, seed=2, command=light_command)
    report = soak(plan, print)
    assert report.holds, report.as_text()
    assert len(report.kills) == 5
    assert {"rolling hash", "loss of every step", "weights and optimizer"} == set(report.checks)
