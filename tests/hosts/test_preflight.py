"""`tidal preflight` over ssh: hosts that are well, hosts with all that may be wrong with them, one that is lost."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.hosts.cluster import Cluster
from tests.launching import ROOT, prepare_sums

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_sums(tmp_path_factory.mktemp("sums"))


def checked(cluster: Cluster, config: Path, hosts: list[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report of a preflight that alpha makes."""
    command = [sys.executable, "-m", "tidal_dist.cli", "preflight", config, "--json", *arguments]
    done = cluster.run("alpha", [*command, "--hostfile", cluster.hostfile(hosts=hosts)])
    assert "Traceback" not in done.stderr
    assert done.stdout.count("\n") == 1, done.stderr
    return done.returncode, json.loads(done.stdout)


def failures(report: dict[str, Any]) -> set[tuple[str, str, str]]:
    assert all(row["remedy"] for row in report["rows"] if row["status"] == "fail")
    return {(row["host"], row["check"], row["what"]) for row in report["rows"] if row["status"] == "fail"}


def test_two_hosts_that_are_well_are_a_go_and_left_as_they_were(cluster: Cluster, config: Path) -> None:
    before = set(config.parent.rglob("*"))
    code, report = checked(cluster, config, ["alpha", "beta"])
    assert failures(report) == set()
    assert code == 0
    measured = report["measured"]
    assert measured["ranks"] == 2
    assert [slow["pair"] for slow in measured["pairs"]["slowest"]] == [["alpha", "beta"]]
    assert measured["checkpoint"]["problem"] is None
    assert measured["checkpoint"]["bytes"] > 2 * measured["message_bytes"]
    network = next(row["what"] for row in report["rows"] if row["check"] == "network")
    assert f"{cluster.address('alpha')} port" in network
    assert set(config.parent.rglob("*")) == before
    assert [p.cmdline() for host in cluster.hosts for p in cluster.processes(host)] == []


@pytest.fixture
def covered(cluster: Cluster) -> Iterator[Any]:
    """`cover(host, place, *mount arguments)`: mounts something over a place on a host, until the end of the test."""
    mounted = []

    def cover(host: str, place: Path, *arguments: str) -> None:
        assert cluster.run(host, ["mount", *arguments, place]).returncode == 0
        mounted.append((host, place))

    yield cover
    for host, place in mounted:
        cluster.run(host, ["umount", place])


def test_whatever_is_wrong_with_hosts_is_a_row_each(
    cluster: Cluster, config: Path, covered: Any, tmp_path: Path
) -> None:
    for name in ("password", "silent", "bare"):
        cluster.add(name)
    cluster.stop_sshd("silent")
    (cluster.home("password") / ".ssh" / "authorized_keys").unlink()
    nothing, changed, run = tmp_path / "nothing", tmp_path / "errors.py", tmp_path / "run"
    for folder in (nothing, run):
        folder.mkdir()
    covered("bare", Path(sys.executable).parent, "--bind", str(nothing))
    source = ROOT / "tidal_dist" / "errors.py"
    shutil.copy(source, changed)
    with open(changed, "a") as file:
        file.write("# of another version\n")
    covered("beta", source, "--bind", str(changed))
    covered("beta", run, "-t", "tmpfs", "-o", "size=64k", "tmpfs")
    hosts = ["alpha", "beta", "password", "silent", "bare", "nowhere"]
    code, report = checked(cluster, config, hosts, f"run_dir={run}", "data.lanes=12", "training.batch_rows=12")
    assert code == 1
    found = {(host, check): what for host, check, what in failures(report)}
    assert set(found) == {
        ("beta", "project"),
        ("beta", "disks"),
        ("beta", "run folder"),
        ("password", "ssh"),
        ("silent", "ssh"),
        ("bare", "python"),
        ("nowhere", "ssh"),
    }
    assert "without a password" in found["password", "ssh"]
    assert "refuses" in found["silent", "ssh"]
    assert "does not resolve" in found["nowhere", "ssh"]
    assert "does not start" in found["bare", "python"]
    assert "No space left" in found["beta", "run folder"]
    assert list(run.iterdir()) == []


def test_a_host_that_goes_away_in_the_middle_is_a_row(cluster: Cluster, config: Path) -> None:
    def is_looking(process: psutil.Process) -> bool:
        try:
            return process.cmdline()[1:3] == ["-", "look"]
        except psutil.Error:
            return False

    def take_away() -> None:
        deadline = time.monotonic() + 60
        while not any(map(is_looking, cluster.processes("beta"))) and time.monotonic() < deadline:
            time.sleep(0.02)
        subprocess.run(["kill", "-9", *(str(p.pid) for p in cluster._everything("beta") if p.name() == "sshd")])

    thread = threading.Thread(target=take_away)
    thread.start()
    code, report = checked(cluster, config, ["alpha", "beta"])
    thread.join()
    assert code == 1
    [(host, check, what)] = failures(report)
    assert (host, check) == ("beta", "probe")
    assert "went away in the middle" in what
    assert {row["host"] for row in report["rows"] if row["check"] == "shards"} == {"alpha"}
