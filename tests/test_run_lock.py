"""A run folder belongs to one job at a time; a job that was killed does not keep it."""

import errno
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launching import ROOT, environment
from tidal_dist.errors import UserError
from tidal_dist.training import run_lock
from tidal_dist.training.heartbeat import heartbeat_file

HOLDER = """
import sys, time
from pathlib import Path
from tidal_dist.training import run_lock
with run_lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run_lock, "_PATIENCE_SECONDS", 0.0)
    return tmp_path / "run"


@pytest.fixture
def holder(run: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_job_is_refused_with_the_name_of_the_first(run: Path, holder: "subprocess.Popen[str]") -> None:
    with pytest.raises(UserError) as error, run_lock.held(run):
        pass
    first = rf"process {holder.pid} on {socket.gethostname()} since \d\d\d\d-\d\d-\d\d \d\d:\d\d UTC"
    assert re.search(rf"^{run}: {first} is at it; wait until it has ended, or stop it$", str(error.value))
    holder.kill()
    holder.wait()
    with run_lock.held(run):
        assert (run / run_lock.RUN_LOCK).exists()


def test_a_mistake_leaves_no_new_folder_behind(run: Path) -> None:
    with pytest.raises(UserError, match="no such shards"), run_lock.held(run):
        raise UserError("no such shards")
    assert not run.exists()
    run.mkdir()
    with pytest.raises(UserError, match="no such shards"), run_lock.held(run):
        raise UserError("no such shards")
    assert run.exists()


def beat(run: Path, **changes: Any) -> None:
    content = {"rank": 0, "world": 1, "local_rank": 0, "host": "elsewhere", "pid": 7, "started": 1e9}
    path = heartbeat_file(run, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | {"written": time.time()} | changes))


@pytest.mark.parametrize("locks", [True, False], ids=["locks of one machine only", "no locks"])
def test_where_locks_do_not_reach_heartbeats_tell(run: Path, locks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if not locks:
        monkeypatch.setattr("fcntl.flock", refuse)
    beat(run)
    with pytest.raises(UserError, match="process 7 on elsewhere is at it since 2001-09-09 01:46 UTC"):  # noqa: SIM117
        with run_lock.held(run, pause=lambda _: beat(run)):
            pass
    with run_lock.held(run, pause=lambda _: None):  # it does not go on beating
        pass
    beat(run, ended="stopped")
    with run_lock.held(run, pause=lambda _: pytest.fail("nothing to wait for")):
        pass
    beat(run)
    os.utime(heartbeat_file(run, 0), (1e9, 1e9))
    with run_lock.held(run, pause=lambda _: pytest.fail("nothing to wait for")):
        pass


def test_a_folder_that_cannot_be_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(UserError, match=r"run\.lock: cannot write \(Read-only file system\); choose another run_dir"):  # noqa: SIM117
        with run_lock.held(run):
            pass
