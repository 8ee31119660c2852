"""The events of a run."""

from datetime import datetime
from pathlib import Path

import pytest

from tidal_dist.history.events import EVENTS, Events, read_events


def test_events_are_read_as_they_were_added(tmp_path: Path) -> None:
    events = Events(tmp_path / "run", writes=True)
    events.add("start", 0)
    events.add("save", 3, seconds=0.5, where=Path("a"))
    found = read_events(tmp_path / "run")
    assert [(e["event"], e["step"]) for e in found] == [("start", 0), ("save", 3)]
    assert (found[1]["seconds"], found[1]["where"]) == (0.5, "a")
    assert datetime.fromisoformat(found[0]["time"]).utcoffset() is not None


def test_only_one_rank_writes(tmp_path: Path) -> None:
    Events(tmp_path, writes=False).add("start", 0)
    assert read_events(tmp_path) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", ['{"time": "2026-11-25T00:00:00+00:00", "step": 5, "ev', "{}\n", "[1]\n", "\xff\n"])
def test_a_line_that_was_cut_off_loses_nothing_else(tmp_path: Path, cut: str) -> None:
    events = Events(tmp_path, writes=True)
    events.add("start", 0)
    with open(tmp_path / EVENTS, "a", encoding="latin-1") as file:
        file.write(cut)
    events.add("resume", 3)
    assert [e["event"] for e in read_events(tmp_path)] == ["start", "resume"]


def test_a_disk_that_refuses_loses_only_the_line(tmp_path: Path) -> None:
    (tmp_path / EVENTS).mkdir()
    Events(tmp_path, writes=True).add("start", 0)
    assert read_events(tmp_path) == []
