"""`deepspeed --hostfile H launch/train.py --config C` as it stands, on two hosts, through each launcher there is."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hosts import slurm
from tests.hosts.cluster import Cluster
from tests.hosts.namespaces import PATH, Command
from tests.launching import launched, prepare_sums
from tidal_dist.cluster.preflight.trial import MARK
from tidal_dist.drill.evidence import recorded_losses
from tidal_dist.history.events import read_events

pytestmark = pytest.mark.slow
DEEPSPEED = str(Path(sys.executable).parent / "deepspeed")
# Threads are part of the numbers. Nothing of a long run is needed but its first steps.
SETTINGS = ("training.threads_per_rank=1", "training.steps=3", "validation.prompts=1")
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_sums(tmp_path_factory.mktemp("sums"))


@pytest.fixture(scope="session")
def on_one_host(config: Path) -> dict[int, float]:
    """The losses of two ranks here."""
    run = config.parent / "one-host"
    launched(config, f"run_dir={run}", *SETTINGS)
    return recorded_losses(run)


def check(run: Path, outcome: tuple[int, str], expected: dict[int, float]) -> None:
    code, output = outcome
    assert code == 0, output[-3000:]
    assert recorded_losses(run) == expected
    assert list(expected) == [1, 2, 3]
    assert sorted(log.name for log in (run / "logs").iterdir()) == ["rank-00000-alpha.log", "rank-00001-beta.log"]
    assert "step 3: loss" in (run / "logs" / "rank-00000-alpha.log").read_text()


def deepspeed(
    cluster: Cluster, script: list[str], *launcher: str, env: dict[str, str] | None = None
) -> tuple[int, str]:
    """Exit code and output of what a user types on the first host."""
    done = cluster.run("alpha", [DEEPSPEED, "--hostfile", str(cluster.hostfile()), *launcher, *script], env=env or {})
    return done.returncode, done.stdout + done.stderr


def training(config: Path, run: Path) -> list[str]:
    return ["launch/train.py", "--config", str(config), f"run_dir={run}", *SETTINGS]


def test_pdsh(cluster: Cluster, config: Path, on_one_host: dict[int, float], tmp_path: Path) -> None:
    """Without an environment file, where gloo by itself would take 127.0.1.1 and never reach the other host."""
    cluster.name_as_debian_does()
    check(tmp_path, deepspeed(cluster, training(config, tmp_path)), on_one_host)
    assert not cluster.processes("beta")


def test_without_ssh(cluster: Cluster, config: Path, on_one_host: dict[int, float], tmp_path: Path) -> None:
    """Each host is told its number by something else, such as Slurm or Kubernetes."""
    for host in cluster.hosts:
        cluster.stop_sshd(host)
    common = [DEEPSPEED, "--hostfile", str(cluster.hostfile()), "--no_ssh", "--master_addr", cluster.address("alpha")]

    def start(host: str) -> Command:
        number = str(cluster.hosts.index(host))
        return cluster.popen(
            host, [*common, "--node_rank", number, *training(config, tmp_path)], stderr=subprocess.STDOUT
        )

    with start("beta") as beta, start("alpha") as alpha:
        outputs = [process.communicate(timeout=240)[0] for process in (alpha, beta)]
    check(tmp_path, (alpha.returncode or beta.returncode, "".join(outputs)), on_one_host)


@pytest.mark.parametrize(("launcher", "program"), [("openmpi", "mpirun.openmpi"), ("mpich", "mpirun.mpich")])
def test_mpirun(cluster: Cluster, config: Path, tmp_path: Path, launcher: str, program: str) -> None:
    """Ranks meet and do what preflight has them do; that they train as others do need not be seen for each launcher."""
    if shutil.which(program) is None:
        pytest.skip(f"no {program} (package {launcher}-bin or {launcher}) here")
    # Whichever MPI the machine calls `mpirun`, here it is this one.
    mpirun = tmp_path / "bin" / "mpirun"
    mpirun.parent.mkdir()
    mpirun.write_text(f'#!/bin/sh\nexec {program} "$@"\n')
    mpirun.chmod(0o755)
    env = AS_ROOT | {"PATH": f"{mpirun.parent}:/usr/sbin:/usr/bin:/bin"}
    script = ["launch/preflight.py", "--config", str(config), f"run_dir={tmp_path / 'run'}"]
    code, output = deepspeed(cluster, script, "--launcher", launcher, env=env)
    assert code == 0, output
    (found,) = [json.loads(line.partition(MARK)[2]) for line in output.splitlines() if MARK in line]
    assert found["ranks"] == 2
    assert list(found["pairs"]["median_by_host"]) == ["alpha", "beta"]
    assert found["checkpoint"]["problem"] is None


def test_slurm(cluster: Cluster, config: Path, on_one_host: dict[int, float], tmp_path: Path) -> None:
    if programs := slurm.missing():
        pytest.skip(f"no {programs} (packages slurmctld, slurmd, slurm-client) here")
    env = slurm.start_slurm(cluster)
    check(tmp_path, deepspeed(cluster, training(config, tmp_path), "--launcher", "slurm", env=env), on_one_host)


def test_a_batch_job_saves_and_is_queued_again_when_its_time_is_up(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    """A signal goes from Slurm to the batch shell, through the supervisor and srun to the ranks of both hosts."""
    if programs := slurm.missing():
        pytest.skip(f"no {programs} (packages slurmctld, slurmd, slurm-client) here")
    env = slurm.start_slurm(cluster) | {"TIDAL_PYTHON": sys.executable, "PATH": f"{Path(DEEPSPEED).parent}:{PATH}"}

    def slurm_says(*command: str) -> str:
        done = cluster.run("alpha", command, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run, log = tmp_path / "run", tmp_path / "job.log"
    script = ["launch/slurm/train.sbatch", str(config), f"run_dir={run}", *SETTINGS, "training.steps=100000"]
    slurm_says("sbatch", "--nodes=2", "--gpus-per-node=1", "--time=0", f"--output={log}", *script)
    wait_for(lambda: "step 2: loss" in log.read_text() if log.exists() else False)
    slurm_says("scancel", "--signal=USR1", "--batch", "--name=tidal")
    wait_for(lambda: slurm_says("squeue", "--noheader", "--format=%T").split() == ["PENDING"])
    assert "queued again" in log.read_text()
    events = [event["event"] for event in read_events(run)]
    assert (events[0], events[-1]) == ("start", "stop")
    assert list(run.glob("checkpoints/step-*/COMMIT"))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
