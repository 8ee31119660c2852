"""`python -m launch.supervise` and the Slurm script around it, with a launcher that is played."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.supervise import main
from tests.launching import ROOT, environment, write_config
from tests.supervising import STEPS

LAUNCHER = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'tests' / 'supervising.py'))}"


class Scene:
    def __init__(self, folder: Path):
        self.folder, self.run = folder, folder / "run"
        self.config = write_config(folder, training={"steps": STEPS})

    def plan(self, *actions: str) -> None:
        (self.folder / "plan").write_text("\n".join(actions))

    def starts(self) -> list[list[str]]:
        path = self.folder / "starts"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def arguments(self, *more: str) -> list[str]:
        return ["--config", str(self.config), "--pause", "0.01", "--launcher-command", LAUNCHER, *more]

    def supervised(self, *more: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "launch.supervise", *self.arguments(*more)]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def rank(self, process: "subprocess.Popen[str]") -> int:
        """The process of the rank that is played, once it is there."""
        path = self.run / "pid"
        while not (path.exists() and path.read_text()):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        return int(path.read_text())


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_goes_on_after_crashes_until_it_is_finished(scene: Scene) -> None:
    scene.plan("crash", "crash 2", "crash", "finish")
    assert main([*scene.arguments("--num_gpus", "2"), "--", "training.seed=3"]) == 0
    first, second, third, last = scene.starts()
    assert first[:2] == ["--num_gpus", "2"]
    assert first[-1] == "training.seed=3"
    assert ["--resume" in start for start in (first, second, third, last)] == [False, False, True, True]
    assert main(scene.arguments()) == 0  # what is finished is not started
    assert len(scene.starts()) == 4


def test_gives_up_where_nothing_is_gained(scene: Scene) -> None:
    scene.plan("crash", "crash 2", "crash", "crash", "finish")
    assert main(scene.arguments("--max-restarts", "1")) == 1
    assert len(scene.starts()) == 4  # a new checkpoint set the count back once


def test_a_mistake_is_not_repeated(scene: Scene) -> None:
    scene.plan("exit 2", "finish")
    assert main(scene.arguments()) == 2
    assert len(scene.starts()) == 1


def test_a_launcher_that_was_killed_is_not_believed(scene: Scene) -> None:
    scene.plan("exit 0", "finish")
    assert main(scene.arguments()) == 0
    assert len(scene.starts()) == 2


def test_once_leaves_restarts_to_others(scene: Scene) -> None:
    scene.plan("crash 2", "exit 2", "finish")
    arguments = scene.arguments("--once")
    assert [main(arguments) for _ in range(4)] == [1, 2, 0, 0]
    assert ["--resume" in start for start in scene.starts()] == [False, True, True]


@pytest.mark.slow
def test_once_a_stop_is_not_the_end(scene: Scene) -> None:
    scene.plan("train 1")
    with scene.supervised("--once") as process:
        scene.rank(process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 3, output


def test_wrong_arguments(scene: Scene, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(scene.folder / "none.yaml")]) == 2
    assert "no such configuration file" in capfd.readouterr().err
    assert main([*scene.arguments(), "--launcher-command", "/nowhere/launcher"]) == 2
    assert "error: /nowhere/launcher: cannot start" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_signals_reach_the_ranks_and_end_the_supervision(scene: Scene, number: signal.Signals) -> None:
    scene.plan("train 1", "finish")
    with scene.supervised() as process:
        scene.rank(process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert f"{number.name}: handed on" in output
    assert len(scene.starts()) == 1
    assert '"stop"' in (scene.run / "events.jsonl").read_text()


def test_a_signal_to_a_rank_alone_is_a_stop_too(scene: Scene) -> None:
    scene.plan("train 1", "finish")
    with scene.supervised() as process:
        os.kill(scene.rank(process), signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert len(scene.starts()) == 1


@pytest.mark.slow
def test_a_second_signal_ends_what_is_stuck(scene: Scene) -> None:
    scene.plan("train 2", "finish")
    with scene.supervised() as process:
        rank = scene.rank(process)
        process.send_signal(signal.SIGTERM)
        assert process.stdout
        assert "heard SIGTERM\n" in process.stdout  # signals of one kind that come together are one
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert not Path(f"/proc/{rank}").exists()


SLURM = {
    "scontrol": 'case "$1" in show) echo node1; echo node2;; *) echo "$@" >> "$SCENE/scontrol";; esac',
    # Runs the command once for each node, and hands SIGUSR1 on to its tasks.
    "srun": 'while [[ "$1" == --* ]]; do shift; done\n'
    'for node in 0 1; do SLURM_NODEID=$node "$@" & tasks+=($!); done\n'
    "trap 'kill -USR1 \"${tasks[@]}\" 2> /dev/null' USR1\n"
    'code=0; for task in "${tasks[@]}"; do while true; do wait "$task"; last=$?; '
    'kill -0 "$task" 2> /dev/null || break; done; [ $last -eq 0 ] || code=$last; done; exit $code',
    "deepspeed": f'exec {LAUNCHER} "$@"',
}


@pytest.fixture
def slurm(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Scene:
    commands = scene.folder / "bin"
    commands.mkdir()
    for name, text in SLURM.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    variables |= {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SCENE": str(scene.folder),
        "TIDAL_PYTHON": sys.executable,
    }
    for name, value in (variables | environment() | {"PATH": variables["PATH"]}).items():
        monkeypatch.setenv(name, value)
    return scene


def batch_job(scene: Scene) -> "subprocess.Popen[str]":
    command = ["bash", str(ROOT / "launch" / "slurm" / "train.sbatch"), str(scene.config), "training.seed=3"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_job_whose_time_is_up_is_queued_again_and_then_finishes(slurm: Scene) -> None:
    slurm.plan("crash 2", "train 1", "finish")
    with batch_job(slurm) as process:
        slurm.rank(process)
        process.send_signal(signal.SIGUSR1)  # as `--signal=B:USR1@180` does
        output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert "stopped after step 4 of the run; queued again" in output
    assert (slurm.folder / "scontrol").read_text() == "requeue 77\n"
    with batch_job(slurm) as process:
        output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert (slurm.folder / "scontrol").read_text() == "requeue 77\n"
    for start in slurm.starts():
        assert start[start.index("--node_rank") + 1] == "0"
        assert start[start.index("--master_addr") + 1] == "node1"
        assert start[start.index("--master_port") + 1] == "20077"
        assert start[-1] == "training.seed=3"
    assert ["--resume" in start for start in slurm.starts()] == [False, True, True]
    assert not list(ROOT.glob(".hosts-*"))


@pytest.mark.slow
def test_a_job_that_gains_nothing_or_fails_is_not_queued_again(slurm: Scene) -> None:
    slurm.plan("exit 2")
    with batch_job(slurm) as process:
        output, _ = process.communicate(timeout=100)
    assert process.returncode == 2, output
    assert not (slurm.folder / "scontrol").exists()


# Plays `tidal preflight`, which finds what a file says, and `tidal launch`.
TIDAL = f"""
case "$2 $3" in
"tidal_dist.cli preflight") echo "${{@:4}}" > "$SCENE/preflight"; exit "$(cat "$SCENE/verdict")";;
"tidal_dist.cli launch") exec {shlex.quote(sys.executable)} -m launch.supervise --config "$4" \\
    --launcher-command {shlex.quote(LAUNCHER)} "${{@:6}}" -- "$5";;
*) exec {shlex.quote(sys.executable)} "$@";;
esac
"""


@pytest.mark.slow
@pytest.mark.parametrize("verdict", [0, 1])
def test_the_way_over_ssh_begins_with_a_preflight(slurm: Scene, monkeypatch: pytest.MonkeyPatch, verdict: int) -> None:
    python = slurm.folder / "bin" / "played-python"
    python.write_text(f"#!/bin/bash{TIDAL}")
    python.chmod(0o755)
    monkeypatch.setenv("TIDAL_PYTHON", str(python))
    monkeypatch.setenv("TIDAL_LAUNCHER", "pdsh")
    (slurm.folder / "verdict").write_text(str(verdict))
    slurm.plan("finish")
    with batch_job(slurm) as process:
        output, _ = process.communicate(timeout=100)
    assert process.returncode == verdict, output
    hostfile = f"--hostfile {ROOT}/.hosts-77"
    assert (slurm.folder / "preflight").read_text() == f"{slurm.config} training.seed=3 {hostfile}\n"
    assert [" ".join(start[:2]) for start in slurm.starts()] == ([] if verdict else [hostfile])
    assert not (slurm.folder / "scontrol").exists()
