"""The hosts that the other tests of this folder run on."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.hosts.cluster import Cluster
from tests.hosts.namespaces import obstacle
from tests.launching import ROOT, environment

pytestmark = pytest.mark.slow
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=1")


def test_hosts_have_names_and_reach_each_other(cluster: Cluster) -> None:
    command = f"hostname; {sys.executable} -c 'print(6 * 7)'; echo $HOME"
    done = cluster.run("alpha", ["pdsh", "-R", "ssh", "-w", "alpha,beta", command])
    assert done.returncode == 0, done.stderr
    expected = [[f"{h}: {h}", f"{h}: 42", f"{h}: {cluster.home(h)}"] for h in cluster.hosts]
    assert sorted(done.stdout.splitlines()) == sorted(line for lines in expected for line in lines)
    assert cluster.hostfile(slots=2).read_text() == "alpha slots=2\nbeta slots=2\n"
    assert cluster.run("beta", ["hostname", "-I"]).stdout.split() == [cluster.address("beta")]


def test_what_runs_on_a_host_is_seen_and_signalled_there_alone(cluster: Cluster) -> None:
    with cluster.popen("alpha", ["sleep", "100"]) as here, cluster.popen("beta", ["sleep", "100"]) as there:
        while not cluster.processes("alpha"):
            time.sleep(0.01)
        assert [p.name() for p in cluster.processes("alpha")] == ["sleep"]
        assert cluster.run("alpha", ["pkill", "sleep"]).returncode == 0
        assert here.wait(5) == -signal.SIGTERM
        assert there.poll() is None
        there.send_signal(signal.SIGUSR1)
        assert there.wait(5) == -signal.SIGUSR1
    assert not cluster.processes("alpha")


def test_hosts_fail_as_hosts_do_and_are_in_order_afterwards(cluster: Cluster) -> None:
    def problem(*command: str) -> str:
        return cluster.run("alpha", [*SSH, *command]).stderr

    cluster.add("gamma")
    assert problem("gamma", "true") == ""
    cluster.stop_sshd("gamma")
    assert "Connection refused" in problem("gamma", "true")
    cluster.cut("beta")
    assert "timed out" in problem("beta", "true")
    assert "not known" in problem("delta", "true")
    (cluster.home("alpha") / ".ssh" / "known_hosts").unlink()
    cluster.mend("beta")
    assert "Host key verification failed" in problem("beta", "true")
    cluster.reset()
    assert cluster.hosts == ["alpha", "beta"]
    assert problem("beta", "true") == ""


def test_nothing_outlives_who_made_them(cluster: Cluster, tmp_path: Path) -> None:  # noqa: ARG001 - skips
    assert obstacle() is None
    code = (
        "import sys, time; from pathlib import Path; from tests.hosts.cluster import two_hosts\n"
        "with two_hosts(Path(sys.argv[1])) as cluster:\n"
        "    cluster.popen('beta', ['ssh', 'alpha', 'sleep 100'])\n"
        "    while not cluster.processes('alpha'): time.sleep(0.05)\n"
        "    print(*(p.pid for host in cluster.hosts for p in cluster._everything(host)), flush=True)\n"
        "    time.sleep(100)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "hosts")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()) as process:
        assert process.stdout
        numbers = [int(word) for word in process.stdout.readline().split()]
        assert len(numbers) >= 4
        process.kill()
    deadline = time.monotonic() + 30
    while (left := [n for n in numbers if psutil.pid_exists(n)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
