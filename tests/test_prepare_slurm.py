"""`tidal prepare` on Slurm: the jobs that are submitted, and that they do the work; Slurm itself is played."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import dill
import pytest

from data_pipeline.errors import UserError
from tests.launching import tidal_error, tidal_here
from tests.preparing import FILES, config_file, contents, write_texts

SLURM: dict[str, Any] = {
    "partition": "night",
    "time": "02:00:00",
    "mem_per_cpu_gb": 3,
    "qos": "low",
    "sbatch_args": {"account": "texts"},
}
COMMANDS = {
    # Keeps the script and the arguments of each job, and numbers them from 1.
    "sbatch": 'n=$(($(ls "$SLURM_SCENE" | wc -l) + 1)); [ -e "$SLURM_SCENE.broken" ] && [ $n -gt 2 ] && exit 1\n'
    'mkdir "$SLURM_SCENE/$n"; cp "${@: -1}" "$SLURM_SCENE/$n/script"; echo "$@" > "$SLURM_SCENE/$n/arguments"\n'
    'echo "Submitted batch job $n"',
    "squeue": '[ -e "$SLURM_SCENE.queue" ] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }\n'
    'cat "$SLURM_SCENE.queue"',
    "scontrol": 'echo "node1"',
    "scancel": 'echo "$@" > "$SLURM_SCENE.cancelled"',
    "srun": 'while [ "$1" != launch_pickled_pipeline ]; do shift; done; exec "$@"',
}


class Scene:
    """A corpus, its configuration, and a Slurm of shell scripts."""

    def __init__(self, folder: Path):
        write_texts(folder / "texts")
        self.folder, self.jobs_folder = folder, folder / "jobs"
        self.jobs_folder.mkdir()
        self.config = config_file(folder, prepare={"executor": "slurm", "slurm": SLURM, "workers": 2})

    def prepare(self, *arguments: str) -> dict[str, Any]:
        result = tidal_here("prepare", "--json", *arguments, self.config)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def jobs(self) -> list[tuple[str, str]]:
        """Script and arguments of each job."""
        folders = sorted(self.jobs_folder.iterdir(), key=lambda f: int(f.name))
        return [((f / "script").read_text(), (f / "arguments").read_text()) for f in folders]

    def run(self, stage: str, tasks: int) -> None:
        """Do the tasks of a stage as its job array would."""
        pickled = self.folder / ".shards.partial" / "logs" / stage / "executor.pik"
        for task in range(tasks):
            os.environ["SLURM_ARRAY_TASK_ID"] = str(task)
            with open(pickled, "rb") as file:
                dill.load(file).run()
        del os.environ["SLURM_ARRAY_TASK_ID"]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_SCENE", str(tmp_path / "jobs"))
    monkeypatch.setenv("SLURM_NODELIST", "node1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    return Scene(tmp_path)


def test_the_job_files(scene: Scene) -> None:
    report = scene.prepare()
    stages = [(script, arguments) for script, arguments in scene.jobs() if "launch_pickled_pipeline" in script]
    assert list(report["jobs"]) == ["tokenizer", "shards", "finish"]
    assert {name: (s["tasks"], s["done"]) for name, s in report["stages"].items()} == {
        "tokenizer": (1, 0),
        "shards": (FILES, 0),
        "finish": (1, 0),
    }
    previous = None
    for (script, arguments), (name, job), last in zip(stages, report["jobs"].items(), [0, FILES - 1, 0], strict=True):
        lines = script.splitlines()
        for directive in (
            "partition=night",
            "time=02:00:00",
            "qos=low",
            "account=texts",
            "mem-per-cpu=3G",
            "cpus-per-task=1",
            f"job-name=shards-{name}",
            f"array=0-{last}%2",
            "kill-on-invalid-dep=yes",
        ):
            assert f"#SBATCH --{directive}" in lines, directive
        assert f"{scene.folder}/.shards.partial/logs/{name}/executor.pik" in lines[-1]
        assert (f"--dependency=afterok:{previous} " in arguments) == (previous is not None)
        previous = job
    # In the queue there is nothing to do but to look.
    (scene.folder / "jobs.queue").write_text("1\n")
    submitted = len(scene.jobs())
    assert scene.prepare()["jobs"] == report["jobs"]
    assert "scancel 1 " in tidal_error("prepare", "--restart", scene.config)
    assert "data.shard_bytes was 3000, is 77" in tidal_error("prepare", scene.config, "data.shard_bytes=77")
    assert len(scene.jobs()) == submitted


@pytest.mark.slow
def test_the_jobs_do_the_work(scene: Scene) -> None:
    handler = signal.getsignal(signal.SIGUSR1)
    scene.prepare()
    scene.run("tokenizer", 1)
    scene.run("shards", FILES - 1)
    # The last task was lost. What is left waits for ever, so somebody cancels it and starts again.
    with pytest.raises(UserError, match="is not done, and finish needs it; start again"):
        scene.run("finish", 1)
    os.environ.pop("SLURM_ARRAY_TASK_ID")
    assert {name: s["done"] for name, s in scene.prepare("--status")["stages"].items()} == {
        "tokenizer": 1,
        "shards": FILES - 1,
        "finish": 0,
    }
    before = len(scene.jobs())
    scene.prepare()
    assert len(scene.jobs()) == 2 * before
    scene.run("tokenizer", 1)
    scene.run("shards", FILES)
    script = next(script for script, _ in reversed(scene.jobs()) if "logs/finish/executor.pik" in script)
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "0"}
    subprocess.run(["bash"], input=script, text=True, check=True, env=environment, capture_output=True)
    report = scene.prepare()
    assert report["splits"]["train"]["documents"] > 100
    assert not (scene.folder / ".shards.partial").exists()
    found = contents(scene.folder / "shards")
    assert (
        tidal_here("prepare", "--overwrite", scene.config, "prepare.executor=local", "prepare.workers=1").returncode
        == 0
    )
    assert contents(scene.folder / "shards") == found
    signal.signal(signal.SIGUSR1, handler)


def test_slurm_refuses(scene: Scene) -> None:
    (scene.folder / "jobs.broken").touch()
    assert "error: sbatch: cannot submit" in tidal_error("prepare", scene.config)
    assert (scene.folder / "jobs.cancelled").read_text() == "1\n"


def test_slurm_needs_a_partition(scene: Scene) -> None:
    config = config_file(scene.folder, prepare={"executor": "slurm"})
    assert "executor slurm needs the section slurm" in tidal_error("prepare", config)
