"""A job over its starts: hosts that do not answer, ranks that get signals, heartbeats that fall silent."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.hosts_here import Here
from tests.launching import write_config
from tidal_dist.cluster import ranks as ranks_module
from tidal_dist.cluster.asking import ask
from tidal_dist.cluster.attempt import Attempt
from tidal_dist.cluster.environment import read_env_file
from tidal_dist.cluster.job import Job, Request
from tidal_dist.cluster.placement import Placement
from tidal_dist.cluster.ranks import RanksOfHosts
from tidal_dist.cluster.transport import Srun
from tidal_dist.config import load_config
from tidal_dist.errors import UserError
from tidal_dist.training.heartbeat import Beat, heartbeat_file

HOSTS = {"red": (0,), "blue": (0,), "old": (0,)}


class Scene:
    def __init__(self, folder: Path, **changes: int):
        self.config_file = write_config(folder, data={"lanes": 6}, training={"batch_rows": 12})
        self.run, self.transport = folder / "run", Here()
        config = load_config(self.config_file)
        # The address is given, so that tests run where there is no network.
        request = Request(str(self.config_file), config, ["training.seed=3"], Placement(HOSTS), master_addr="127.0.0.1")
        self.job = Job(Request(**{**vars(request), **changes}), self.transport, {"NCCL_DEBUG": "INFO"})

    def command(self, resume: bool) -> list[str]:
        """Of the next start."""
        attempt = self.job.start(resume)
        assert isinstance(attempt, Attempt)
        return attempt.command


def test_files_for_the_launcher(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    command = scene.command(False)
    assert command[command.index("--hostfile") + 1] == str(scene.run / "launch" / "hostfile")
    assert (scene.run / "launch" / "hostfile").read_text() == "red slots=1\nblue slots=1\nold slots=1\n"
    handed_on = read_env_file(scene.run / "launch" / "env")
    assert handed_on["NCCL_DEBUG"] == "INFO"
    assert {"TIDAL_LAUNCH_ID", "TIDAL_JOB_STARTED", "PATH"} <= handed_on.keys()
    assert command[-1] == "training.seed=3"
    assert "--resume" not in command


@pytest.mark.slow
def test_goes_on_with_the_most_hosts_that_the_lanes_allow(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    scene = Scene(tmp_path)
    assert "--force_multi" in scene.command(False)
    for gone, expected in (("blue", "red:0@old:0"), ("old", "red:0@blue:0"), ("", "red:0@blue:0@old:0")):
        scene.transport.gone = {gone}
        command = scene.command(True)
        assert command[command.index("--include") + 1] == expected
        assert "--resume" in command
    said = capfd.readouterr().err
    assert "supervise: left out: blue: refuses connections; start sshd there\n" in said
    assert "supervise: going on with 2 of 3 hosts\n" in said
    assert "supervise: going on with 3 of 3 hosts\n" in said


def test_a_job_of_slurm_is_reached_by_its_own_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """srun is played: one node runs the command, the other is down."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(
        "#!/bin/bash\nset -e\n[[ $* == '--overlap --nodes=1 --ntasks=1 --nodelist=node'[12]' '* ]]\n"
        '[ $4 != --nodelist=node2 ] || { echo "srun: error: Node failure on node2" >&2; exit 1; }\nexec "${@:5}"\n'
    )
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", str(srun.parent), prepend=os.pathsep)
    first, second = ask(Srun(), ["node1", "node2"], ["living", os.getpid()], 10)
    assert first.found == {"living": [os.getpid()]}
    assert second.problem == "node2: srun does not run there (Node failure on node2); `scontrol show node node2`"


def test_never_with_fewer_than_the_user_allows(tmp_path: Path) -> None:
    scene = Scene(tmp_path, min_hosts=3)
    scene.command(False)
    scene.transport.gone = {"blue"}
    with pytest.raises(UserError, match=r"^2 of 3 hosts answer, too few for --min-hosts 3$"):
        scene.command(True)


def test_the_first_start_needs_all_hosts(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.transport.gone = {"blue"}
    with pytest.raises(UserError, match=r"^blue: refuses connections; start sshd there$"):
        scene.command(False)
    assert not scene.run.exists()


@contextmanager
def rank(folder: Path, launch: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process like a rank's, with one that it has forked."""
    script = folder / "train.py"
    script.write_text("import os, time\nos.fork()\nopen('ready', 'a').write('x')\ntime.sleep(100)\n")
    command = [sys.executable, "-u", str(script)]
    with subprocess.Popen(command, cwd=folder, env=os.environ | {"TIDAL_LAUNCH_ID": launch}) as process:
        while not (folder / "ready").exists() or (folder / "ready").stat().st_size < 2:
            time.sleep(0.01)
        yield process
        process.kill()


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RanksOfHosts:
    monkeypatch.setattr(ranks_module, "_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(ranks_module, "_HEARTS_SECONDS", 0.0)
    monkeypatch.setattr(ranks_module, "_GRACE_SECONDS", 0.0)
    (tmp_path / "output").write_text("beta: of an earlier start exits with return code = 1\n")
    return RanksOfHosts(Here(), "mine", Placement({"red": (0,)}), tmp_path, tmp_path / "output", tmp_path / "train.py")


def test_each_rank_gets_each_signal_once_also_one_that_comes_late(tmp_path: Path, ranks: RanksOfHosts) -> None:
    ranks.hand_on([])
    ranks.hand_on([signal.SIGTERM])  # there is none yet
    with rank(tmp_path, "mine") as process:
        ranks.hand_on([signal.SIGTERM])
        assert process.wait(5) == -signal.SIGTERM
    ranks.end(0.0)


def test_what_is_left_is_killed_but_no_other_launch(tmp_path: Path, ranks: RanksOfHosts) -> None:
    (tmp_path / "another").mkdir()
    with rank(tmp_path, "mine") as process, rank(tmp_path / "another", "mine too") as other:
        ranks.look(0)
        assert ranks.failed() is None
        ranks.end(0.0)
        assert process.wait(5) == -signal.SIGKILL
        assert other.poll() is None


def test_a_launcher_that_waits_for_others_is_not_waited_for(
    tmp_path: Path, ranks: RanksOfHosts, capfd: pytest.CaptureFixture[str]
) -> None:
    with open(tmp_path / "output", "a") as file:
        file.write("red: [2026-01-01] [ERROR] [launch.py:259:f] ['python'] exits with return ")
        file.flush()
        ranks.look(0)
        assert ranks.failed() is None
        file.write("code = -9\n")
    ranks.look(0)
    assert ranks.failed() == -9
    ranks.end(10.0)
    out, err = capfd.readouterr()
    assert out.endswith("exits with return code = -9\n")
    assert err.startswith("supervise: rank 0 on red was killed by SIGKILL")


def test_a_rank_that_fell_silent_and_is_gone_counts_as_dead(tmp_path: Path, ranks: RanksOfHosts) -> None:
    def beat(pid: int) -> None:
        path = heartbeat_file(tmp_path, 0)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(vars(Beat(0, 1, 0, "elsewhere", pid, time.time() - 100))))
        os.utime(path, (time.time() - 60,) * 2)

    beat(os.getpid())
    ranks.look(0)
    assert ranks.failed() is None  # silent, but its process is there: a collective's time limit will tell
    with subprocess.Popen(["true"]) as ended:
        pass
    beat(ended.pid)
    ranks.look(0)
    assert ranks.failed() == 1
    ranks.end(0.0)
    assert json.loads(heartbeat_file(tmp_path, 0).read_text())["ended"] == "has ended without a word in start"
