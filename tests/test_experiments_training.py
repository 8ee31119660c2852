"""Two jobs that really train, the same but that one is killed amid, with who runs it: they end with the same result."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from experiments.places import Places
from experiments.runner import run
from experiments.spec import load_set
from tests.experimenting import SCRIPT, fake_tasks, work, write_set
from tests.ranks import ROOT, environment
from tidal_dist.history.events import read_events

pytestmark = pytest.mark.slow


def results(runs: Path) -> dict[str, Any]:
    """All result files, without when they were made."""
    found = {}
    for path in runs.rglob("result.json"):
        content = json.loads(path.read_text())
        assert content.pop("made")["training_seconds"] > 0
        found[path.parent.relative_to(runs).as_posix()] = content
    return found


def test_a_kill_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "experiments.tasks", fake_tasks())
    sets, runs = write_set(tmp_path, variants={"killed": {}, "undisturbed": {}}, seeds=[1]), tmp_path / "runs"
    command = [sys.executable, str(SCRIPT), "run", str(sets), str(runs)]
    killed = subprocess.run(command, env=environment(), cwd=ROOT, timeout=200, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    while [p for p in psutil.process_iter() if str(runs) in " ".join(_arguments(p))]:
        time.sleep(0.05)  # the job's processes end by themselves
    assert results(runs) == {}
    folder = runs / "tiny/sums/killed/seed-1"
    assert (folder / "run/checkpoints/step-00000003/COMMIT").exists()

    jobs = load_set(sets / "tiny")[0].jobs
    said: list[str] = []
    assert run(jobs, Places(runs, "tiny", "sources"), 1, False, said.append, work()) == [], said
    assert "resume" in [event["event"] for event in read_events(folder / "run")]
    ended = results(runs)
    assert sorted(ended) == ["tiny/sums/killed/seed-1", "tiny/sums/undisturbed/seed-1"]
    killed_result, undisturbed = ended.values()
    assert killed_result == undisturbed
    assert [step for step, _ in undisturbed["curves"]["bits_per_byte"]] == [3, 6]
    assert undisturbed["figures"]["tests"]["short"]["bits_per_byte"] > 0


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
