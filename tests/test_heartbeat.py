"""Heartbeats: what they say, when they are written, and that nothing they meet disturbs a run."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tidal_dist.training.heartbeat import Beat, Heartbeat, heartbeat_file
from tidal_dist.training.phases import Phases


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def beat(run: Path, rank: int = 1) -> Beat:
    return Beat(**json.loads(heartbeat_file(run, rank).read_bytes()))


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def test_a_heartbeat_goes_on_while_its_rank_is_stuck(run: Path) -> None:
    heartbeat = Heartbeat(run, stopping=lambda: "SIGTERM", interval_seconds=0.05)
    phases = Phases(lambda: None, heartbeat.enter)
    heartbeat.begin()
    heartbeat.step(7)
    with phases("backward"):
        wait_until(lambda: heartbeat_file(run, 1).exists() and beat(run).phase == "backward")
        first = beat(run)
        wait_until(lambda: beat(run).written > first.written)
        assert (beat(run).since, beat(run).step, beat(run).stopping) == (first.since, 7, "SIGTERM")
    heartbeat.end("finished")
    assert (beat(run).ended, beat(run).rank, beat(run).world) == ("finished", 1, 2)
    assert not any(thread.name == "heartbeat" for thread in threading.enumerate())


def test_seconds_of_steps_leave_out_validation_and_the_first_steps(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeat = Heartbeat(run)
    now = [0.0]
    phases = Phases(lambda: None, heartbeat.enter)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def spend(phase: str, seconds: float) -> None:
        with phases(phase):  # type: ignore[arg-type]
            now[0] += seconds

    heartbeat.enter("start")
    heartbeat.step(0)
    for step in range(1, 6):
        spend("data", 9.0 if step < 3 else 0.1)
        spend("agree", 0.2)
        spend("forward", 0.3)
        now[0] += 0.4
        heartbeat.step(step)
        spend("validation", 50.0)
    monkeypatch.undo()
    monkeypatch.setenv("RANK", "1")
    heartbeat.begin()
    heartbeat.end("finished")
    found = beat(run)
    assert found.seconds == pytest.approx({"data": 0.1, "agree": 0.2, "forward": 0.3, "other": 0.4})
    assert found.working == pytest.approx(0.8)
    assert found.steps_measured == 3


def test_a_folder_that_cannot_be_written_disturbs_nothing(run: Path) -> None:
    (run / "heartbeats").write_text("a file where the folder should be")
    heartbeat = Heartbeat(run, interval_seconds=0.01)
    heartbeat.begin()
    heartbeat.step(1)
    time.sleep(0.05)
    heartbeat.end("finished")
    assert (run / "heartbeats").is_file()


def test_a_mistake_at_the_start_leaves_nothing(run: Path) -> None:
    heartbeat = Heartbeat(run)
    heartbeat.begin()
    heartbeat.end("error: no such shards", is_mistake=True)
    assert list(run.iterdir()) == []


def test_a_run_of_fewer_ranks_removes_what_was_left(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (1, 2, 11):
        heartbeat_file(run, rank).parent.mkdir(exist_ok=True)
        heartbeat_file(run, rank).write_text("{}")
    (run / "heartbeats" / "flight-00001.json").write_text("{}")
    monkeypatch.setenv("RANK", "0")
    heartbeat = Heartbeat(run, interval_seconds=0.01)
    heartbeat.begin()
    heartbeat.step(1)
    wait_until(lambda: not heartbeat_file(run, 11).exists())
    heartbeat.end("finished")
    assert sorted(p.name for p in (run / "heartbeats").iterdir()) == ["rank-00000.json", "rank-00001.json"]
