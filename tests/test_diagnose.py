"""`tidal diagnose` on run folders that are made up: who hangs, who has ended, who is slow, whatever the clocks say."""

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.launching import environment, tidal_error, tidal_here
from tests.ranks import halt
from tidal_dist.diagnose.flights import FLIGHT, FLIGHT_OF_NCCL
from tidal_dist.diagnose.verdict import Verdict, diagnose
from tidal_dist.history.events import Events
from tidal_dist.training.heartbeat import heartbeat_file

SPLIT = {"data": 0.1, "agree": 0.2, "forward": 0.3, "backward": 0.5, "optimizer": 0.1}


class Scene:
    """The heartbeats of a run of four ranks on two hosts, of which no process is on this one."""

    def __init__(self, folder: Path):
        self.run = folder / "run"
        self.now = time.time()

    def beat(self, rank: int, age: float = 1.0, idle: float = 0.5, skew: float = 0.0, **changes: Any) -> None:
        """A heartbeat written `age` seconds ago by a host whose clock is `skew` ahead."""
        written = self.now - age + skew
        content = {
            "rank": rank,
            "world": 4,
            "local_rank": rank % 2,
            "host": f"node{rank // 2}",
            "pid": 100 + rank,
            "started": written - 1000,
            "step": 12,
            "phase": "forward",
            "since": written - idle,
            "active": written - idle,
            "written": written,
            "steps_measured": 50,
            "seconds": SPLIT,
        }
        path = heartbeat_file(self.run, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content | changes))
        os.utime(path, (self.now - age, self.now - age))

    def beats(self, **changes: Any) -> None:
        for rank in range(4):
            self.beat(rank, **changes)

    def verdict(self, **arguments: Any) -> Verdict:
        """What is found; a second look waits for nothing."""
        return diagnose(self.run, **{"pause": lambda _: None} | arguments)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_a_run_that_is_well(scene: Scene) -> None:
    scene.beats()
    verdict = scene.verdict()
    assert (verdict.status, verdict.is_well, verdict.lines) == ("running", True, [])
    scene.beats(step=300, ended="finished", age=1e6)
    assert (scene.verdict().status, scene.verdict().is_well) == ("finished", True)
    scene.beats(ended="stopped", age=1e6)
    assert (scene.verdict().status, scene.verdict().is_well) == ("stopped", True)


def test_a_rank_that_is_dead_while_others_wait_for_it(scene: Scene) -> None:
    scene.beats(idle=90, stack=["loop.py:1 _loop", "engine.py:7 agree"], phase="agree")
    scene.beat(2, age=95, phase="backward", stack=["loop.py:1 _loop", "engine.py:3 backward"])
    verdict = scene.verdict()
    assert (verdict.status, verdict.culprits, verdict.is_well) == ("hung", [2], False)
    culprit, others = verdict.lines
    assert culprit.startswith("rank 2 on node1 (process 102) has given no heartbeat for 95 s")
    assert "in backward of step 13; at engine.py:3 backward" in culprit
    assert others == "ranks 0, 1, 3 stand in agree of step 13 for 90 s; at engine.py:7 agree"


def test_a_run_whose_ranks_are_all_gone(scene: Scene) -> None:
    scene.beats(age=300, ended="lost ranks: Connection closed by peer")
    scene.beat(3, age=310)
    verdict = scene.verdict()
    assert (verdict.status, verdict.culprits) == ("dead", [3])  # the others ended because of it
    scene.beats(age=300, ended="lost ranks: Connection closed by peer")
    scene.beat(1, age=301, ended="OutOfMemoryError: CUDA out of memory")
    verdict = scene.verdict()
    assert (verdict.status, verdict.culprits) == ("failed", [1])
    assert "ended: OutOfMemoryError" in verdict.lines[0]


def test_a_rank_that_waits_for_data_for_ever(scene: Scene) -> None:
    scene.beats(phase="agree", idle=600)
    scene.beat(1, phase="data", idle=605, stack=["storage.py:10 read"])
    verdict = scene.verdict()
    assert (verdict.status, verdict.culprits) == ("hung", [1])
    assert "stands still for 10 min; in data of step 13; at storage.py:10 read" in verdict.lines[0]
    assert scene.verdict(patience=1000).status == "running"


def test_all_ranks_stuck_in_one_place(scene: Scene) -> None:
    scene.beats(phase="backward", idle=600)
    verdict = scene.verdict()
    assert (verdict.status, verdict.culprits, verdict.is_well) == ("hung", [], False)
    assert verdict.lines == ["ranks 0, 1, 2, 3 stand in backward of step 13 for 10 min"]


def test_long_steps_and_long_phases_are_given_their_time(scene: Scene) -> None:
    scene.beats(idle=100, seconds={"forward": 30.0})
    assert scene.verdict().status == "running"
    scene.beats(idle=100, phase="checkpoint")
    assert scene.verdict().status == "running"
    scene.beats(idle=100)
    assert scene.verdict().status == "hung"


def test_a_missing_rank(scene: Scene) -> None:
    scene.beats()
    heartbeat_file(scene.run, 3).unlink()
    heartbeat_file(scene.run, 2).write_text('{"rank": 2')  # cut off
    verdict = scene.verdict()
    assert (verdict.missing, verdict.is_well) == ([2, 3], False)
    assert verdict.lines[0] == "rank 2 has never given a heartbeat"


@given(ratio=st.floats(0.2, 5.0), noise=st.lists(st.floats(0.99, 1.01), min_size=3, max_size=3))
def test_a_slow_rank_is_named_with_what_it_is_slow_in(
    tmp_path_factory: pytest.TempPathFactory, ratio: float, noise: list[float]
) -> None:
    scene = Scene(tmp_path_factory.mktemp("slow"))
    for rank, factor in zip((0, 1, 3), noise, strict=True):
        scene.beat(rank, seconds={"agree": 0.5, "forward": factor})
    scene.beat(2, seconds={"agree": 0.1, "forward": 0.5, "data": ratio - 0.5 if ratio > 0.5 else 0.0})
    verdict = scene.verdict(slower=1.3)
    own = max(ratio, 0.5)
    assert verdict.slow == ([2] if own / sorted(noise)[1] >= 1.3 else [])
    assert verdict.is_well == (not verdict.slow)
    if verdict.slow:
        assert f"rank 2 on node1 is {own / sorted(noise)[1]:.2f} times as slow as the rest" in verdict.lines[0]
        assert "in data" in verdict.lines[0] or own < 1.5  # below, forward is what differs least from the rest


def test_too_few_steps_tell_nothing(scene: Scene) -> None:
    scene.beats()
    scene.beat(0, steps_measured=3, seconds={"forward": 50.0})
    assert scene.verdict().slow == []


@pytest.mark.parametrize("skew", [-400.0, 400.0])
def test_a_clock_that_is_wrong_changes_nothing_but_a_note(scene: Scene, skew: float) -> None:
    scene.beats()
    for rank in (2, 3):
        scene.beat(rank, skew=skew)
    verdict = scene.verdict()
    assert (verdict.status, verdict.is_well) == ("running", True)
    assert verdict.lines == [f"the clock of node1 differs from the file system's by {skew:+.0f} s"]


def test_a_file_system_whose_clock_is_behind_needs_a_second_look(scene: Scene) -> None:
    scene.beats(age=500)

    def meanwhile(_: float) -> None:
        for rank in (0, 1, 3):
            scene.beat(rank, age=494)

    verdict = scene.verdict(pause=meanwhile)
    assert (verdict.status, verdict.culprits) == ("hung", [2])


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def test_processes_of_this_host_are_looked_at(scene: Scene, sleeper: "subprocess.Popen[bytes]") -> None:
    here = {"host": socket.gethostname(), "pid": sleeper.pid}
    scene.beats(idle=1)
    scene.beat(0, **here)
    assert scene.verdict().status == "running"
    halt(sleeper.pid)
    verdict = scene.verdict()
    assert (verdict.status, verdict.culprits) == ("hung", [0])
    assert "was stopped by a signal (SIGSTOP)" in verdict.lines[0]
    sleeper.kill()
    sleeper.wait()
    verdict = scene.verdict()
    assert (verdict.status, verdict.culprits) == ("hung", [0])
    assert "has ended without a word" in verdict.lines[0]


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("evil",))


def test_records_of_collectives_are_read_and_not_run(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scene.beats(phase="agree", idle=600)
    scene.beat(1, phase="data", idle=605)
    frames = [
        {"name": "all_reduce", "filename": "/x/torch/distributed/distributed_c10d.py", "line": 9},
        {"name": "agree", "filename": "/y/engine.py", "line": 31},
    ]
    entry = {"record_id": 7, "collective_seq_id": 40, "profiling_name": "nccl:all_reduce", "state": "scheduled"}
    entry |= {"process_group": ("0", "default_pg"), "frames": frames, "time_discovered_completed_ns": None}
    folder = heartbeat_file(scene.run, 0).parent
    (folder / f"{FLIGHT}00001.json").write_text(json.dumps({"entries": [entry | {"record_id": 6}, entry]}))
    expected = "number 40, all_reduce of group 0 (scheduled, called at engine.py:31)"
    assert scene.verdict().lines[0].endswith(f"its last collective: {expected}")
    (folder / f"{FLIGHT}00001.json").unlink()
    (folder / f"{FLIGHT_OF_NCCL}1").write_bytes(pickle.dumps({"entries": [entry]}))
    assert scene.verdict().lines[0].endswith(f"its last collective: {expected}")
    (folder / f"{FLIGHT_OF_NCCL}1").write_bytes(pickle.dumps(_Evil()))
    assert "collective" not in scene.verdict().lines[0]
    assert not (tmp_path / "evil").exists()


def test_the_command(scene: Scene) -> None:
    scene.beats()
    result = tidal_here("diagnose", scene.run)
    assert result.returncode == 0
    first, header, *rows = result.stdout.decode().splitlines()
    assert first == f"{scene.run}: running"
    assert header.split()[:4] == ["rank", "host", "process", "state"]
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3"]
    scene.beat(2, seconds={"agree": 0.0, "forward": 9.0})
    result = tidal_here("diagnose", scene.run, "--json")
    report = json.loads(result.stdout)
    assert (result.returncode, report["slow"], report["well"]) == (1, [2], False)
    assert report["ranks"][2]["times_the_rest"] == 9.0
    assert tidal_here("diagnose", scene.run, "--slower", "10").returncode == 0


def test_a_run_of_many_ranks_fits_on_a_page(scene: Scene) -> None:
    for rank in range(200):
        scene.beat(rank, world=200)
    scene.beat(150, world=200, seconds={"forward": 9.0})
    text = tidal_here("diagnose", scene.run).stdout.decode()
    assert len(text.splitlines()) < 50
    assert text.splitlines()[3].startswith("150 ")


def test_without_heartbeats_the_events_tell(scene: Scene) -> None:
    assert "not the folder of a run, or one that has not begun" in tidal_error("diagnose", scene.run)
    scene.run.mkdir()
    Events(scene.run, True).add("start", 0)
    assert "not the folder of a run, or one that has not begun" in tidal_error("diagnose", scene.run)
    Events(scene.run, True).add("finish", 9)
    assert tidal_here("diagnose", scene.run).stdout.decode().startswith(f"{scene.run}: finished\n")


def test_neither_torch_nor_deepspeed_is_needed(scene: Scene) -> None:
    scene.beats()
    code = (
        "import sys; sys.modules |= {'torch': None, 'deepspeed': None, 'numpy': None}; from tidal_dist.cli import main"
    )
    code += f"; sys.exit(main(['diagnose', {str(scene.run)!r}]))"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True).returncode == 0
