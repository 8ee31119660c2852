"""The demo's whole path, too short to learn anything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.demo import main
from tests.launching import ROOT, environment, tidal_here, write_config

pytestmark = pytest.mark.slow


def test_the_demo_leaves_its_products_and_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, data={"lanes": 2, "shard_bytes": 100_000, "shards": str(tmp_path / "run/shards")})
    command = [sys.executable, "-m", "launch.demo", "--config", str(config), "--problems", "1000", "--questions", "50"]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "run" / "report.json").read_bytes())
    assert report["ranks"] == 2
    assert report["zero_stage"] == 3
    assert report["activation_checkpointing"] is True
    assert report["probe_loss_export"] == pytest.approx(report["probe_loss_checkpoint"], rel=1e-5)
    assert 0 <= report["exact_match_4x4"] <= report["exact_match"] < 0.5
    assert 0 < report["train_seconds"] < report["total_seconds"]
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"shards", "checkpoints", "tensorboard", "export"}
    assert "12 + 34 =" in result.stdout
    assert result.stdout.splitlines()[-2] == str(tmp_path / "run" / "report.json")

    # "." is the run: its best checkpoint, written by two ranks.
    for patient, sizes, count in (("export", [], 32), (".", ["--documents", "8", "--rows", "16"], 8)):
        run = tmp_path / "run"
        examined = tidal_here("doctor", run / patient, "--data", run / "shards", *sizes, "--json")
        assert examined.returncode == 0, examined.stdout.decode()
        assert json.loads(examined.stdout)["notes"][0].endswith(f"{count} documents, 6 blocks of each")

    monkeypatch.setattr(sys, "argv", command[2:])
    assert main() == 2
    assert "holds an earlier run" in capfd.readouterr().err
