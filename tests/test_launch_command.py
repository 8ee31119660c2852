"""`tidal launch`: what is started with each launcher, and what is refused."""

import json
import shlex
from pathlib import Path

import pytest
from deepspeed.launcher import runner as ds
from deepspeed.launcher.multinode_runner import MPICHRunner, OpenMPIRunner, SlurmRunner

from tests.launching import tidal_error, tidal_here, write_config
from tidal_dist.cluster.command import LAUNCHERS, launcher_arguments
from tidal_dist.cluster.network import Network
from tidal_dist.cluster.placement import Placement

NETWORK = Network("10.0.0.1", 4711, {"red": "eth1", "blue": "eth1"}, "")


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("red slots=2\nblue slots=2\n")
    return path


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_deepspeed_launcher_understands(hostfile: Path, launcher: str) -> None:
    placement = Placement({"red": (0, 1), "blue": (0, 1)}, hostfile)
    given = launcher_arguments(placement, launcher, NETWORK, ["A", "B"], ssh_port=2222, further=["--verbose"])
    arguments = ds.parse_args([*given, "train.py", "--config", "x"])
    assert (arguments.launcher, arguments.master_addr, arguments.master_port) == (launcher, "10.0.0.1", 4711)
    assert (arguments.force_multi, arguments.no_ssh_check, arguments.ssh_port) == (True, True, 2222)
    assert shlex.split(arguments.launcher_args)[-1] == "--verbose"
    pool = ds.fetch_hostfile(arguments.hostfile)
    active = ds.parse_inclusion_exclusion(pool, arguments.include, arguments.exclude)
    assert active == {"red": [0, 1], "blue": [0, 1]}


@pytest.mark.parametrize(
    ("launcher", "runner", "expected"),
    [
        ("openmpi", OpenMPIRunner, "--mca btl_tcp_if_include eth1 --mca oob_tcp_if_include eth1"),
        ("openmpi", OpenMPIRunner, "-x A -x B"),
        ("mpich", MPICHRunner, "-genvlist A,B -iface eth1"),
        ("slurm", SlurmRunner, "--nodelist red,blue --nodes 2"),
    ],
)
def test_the_launcher_below_is_told(hostfile: Path, launcher: str, runner: type, expected: str) -> None:
    placement = Placement({"red": (0, 1), "blue": (0, 1)}, hostfile)
    given = launcher_arguments(placement, launcher, NETWORK, ["A", "B"])
    arguments = ds.parse_args([*given, "train.py"])
    pool = ds.fetch_hostfile(arguments.hostfile)
    active = ds.parse_inclusion_exclusion(pool, arguments.include, "")
    words = " ".join(runner(arguments, "", pool).get_cmd({}, active))
    assert expected in words
    assert "eth0" not in words


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--hostfile", "/nowhere/hosts"], "/nowhere/hosts: cannot read"),
        (["--include", "green"], "'green': write host:0,1@other"),
        (["data.lanes=6"], "data.lanes=6 is not a multiple of 4 ranks"),
        (["--min-hosts", "3"], "--min-hosts 3: there are only 2 hosts"),
        (
            ["--launcher", "mpich", "--include", "red:1@blue:0"],
            "--launcher mpich cannot choose slots 1 of red; use pdsh",
        ),
        (
            ["--launcher", "slurm", "--exclude", "red:1", "data.lanes=3", "training.batch_rows=3"],
            "as many slots on every",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_started(
    hostfile: Path, tmp_path: Path, more: list[str], expected: str
) -> None:
    assert expected in tidal_error("launch", write_config(tmp_path), "--hostfile", hostfile, *more)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_all_and_does_nothing(hostfile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=WARN\nOWN=$HOME/x\n")
    command = ["launch", write_config(tmp_path), "training.seed=3", "--hostfile", hostfile, "--dry-run"]
    report = json.loads(tidal_here(*command, "--json").stdout)
    assert report["ranks"] == 4
    assert report["command"][-1] == "training.seed=3"
    found = {variable["name"]: variable for variable in report["environment"]}
    assert found["NCCL_DEBUG"] == {"name": "NCCL_DEBUG", "value": "WARN", "reason": "a setting of NCCL"}
    assert found["OWN"]["reason"] == "from .deepspeed_env"
    assert report["differences"] == ["NCCL_DEBUG=WARN as in .deepspeed_env; without that it would be INFO"]
    text = tidal_here(*command, "--launcher", "openmpi").stdout.decode()
    assert "  MASTER_ADDR=red\n      where the ranks meet" in text
    assert "-x NCCL_DEBUG" in text
    assert not (tmp_path / "run").exists()
