"""Files for schedulers: what the repository holds is what is rendered, and schedulers would take it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from launch.recipes import KINDS, main
from tests.launching import ROOT
from tidal_dist.cli import parser as cli_parser
from tidal_dist.cluster.environment import reason_for
from tidal_dist.cluster.hostfile import Host, read_hostfile
from tidal_dist.cluster.recipes import GRACE_SECONDS, node_arguments, sbatch_directives

KUBERNETES = ROOT / "launch" / "kubernetes"
SBATCH = ROOT / "launch" / "slurm" / "train.sbatch"
OLDEST, NEWEST = "1.31", "1.37"  # pod failure policies are stable since 1.31


def documents(kind: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / f"{kind}.yaml").read_text()))


def pods(node: Any) -> list[dict[str, Any]]:
    """The specs of all pods in a document."""
    if isinstance(node, list):
        return [pod for inner in node for pod in pods(inner)]
    if not isinstance(node, dict):
        return []
    return [node] if "containers" in node else pods(list(node.values()))


def script_of(pod: dict[str, Any]) -> str:
    shell, option, script = pod["containers"][0]["command"]
    assert [shell, option] == ["sh", "-c"]
    return script


def rendered(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main([*arguments]) == 0
    return list(yaml.safe_load_all(capsys.readouterr().out))


def shellcheck(script: Path) -> str:
    """What shellcheck finds; "": nothing."""
    program = Path(sys.executable).parent / "shellcheck"
    return subprocess.run([str(program), str(script)], capture_output=True, text=True).stdout


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_what_is_rendered(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Mended by `python -m launch.recipes KIND > launch/kubernetes/KIND.yaml`."""
    assert main([kind]) == 0
    assert (KUBERNETES / f"{kind}.yaml").read_text() == capsys.readouterr().out


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_kubernetes_takes_the_job(version: str) -> None:
    for document in documents("job"):
        kubernetes_validate.validate(document, version, strict=True)


def test_the_jobset_controller_takes_the_jobset() -> None:
    (document,) = documents("jobset")
    parsed = JobsetV1alpha2JobSet.from_dict(document)
    assert parsed is not None
    assert parsed.to_dict() == document  # a key that it does not know would be lost


@pytest.mark.parametrize("kind", KINDS)
def test_kubernetes_takes_every_pod(kind: str) -> None:
    for pod in pods(documents(kind)):
        document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": pod}
        kubernetes_validate.validate(document, NEWEST, strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_pod_has_shared_memory_and_time_to_save(kind: str) -> None:
    for pod in pods(documents(kind)):
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert set(mounts.values()) == set(volumes)
        assert pod["terminationGracePeriodSeconds"] == GRACE_SECONDS
        assert pod["restartPolicy"] == "Never"
        for variable in container["env"]:
            assert reason_for(variable["name"]) != "from .deepspeed_env", variable


def test_pods_meet_where_the_first_one_is() -> None:
    service, job = documents("job")
    template = job["spec"]["template"]
    assert template["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert f"--master_addr {job['metadata']['name']}-0.{service['metadata']['name']} " in script_of(template["spec"])
    (jobset,) = documents("jobset")
    (nodes,) = jobset["spec"]["replicatedJobs"]
    name = jobset["metadata"]["name"]
    assert f"--master_addr {name}-{nodes['name']}-0-0.{name} " in script_of(*pods(jobset))


@pytest.mark.parametrize("kind", ["job", "jobset"])
def test_the_script_of_a_pod(kind: str, tmp_path: Path) -> None:
    (pod,) = pods(documents(kind))
    script = tmp_path / "script.sh"
    script.write_text("#!/bin/sh\n" + script_of(pod))
    assert shellcheck(script) == ""
    first, *_ = script_of(pod).splitlines()
    hostfile = tmp_path / "hostfile"
    subprocess.run(["sh", "-c", first.replace("/tmp/hostfile", str(hostfile))], check=True)
    hosts = read_hostfile(hostfile)
    assert len(hosts) == 4
    assert f"--master_addr {hosts[0].name} " in script_of(pod)
    assert {host.slots for host in hosts} == {pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]}


def test_the_launcher_of_the_mpijob_is_one_that_tidal_launch_understands() -> None:
    (document,) = documents("mpijob")
    launcher, worker = pods(document)
    words = shlex.split(script_of(launcher))
    assert words[:2] == ["exec", "tidal"]
    arguments = cli_parser().parse_args(words[2:])
    assert (arguments.hostfile, arguments.requeue) == (Path("/etc/mpi/hostfile"), True)
    assert "resources" not in launcher["containers"][0]
    (container,) = worker["containers"]
    assert "command" not in container  # the operator starts sshd
    assert container["resources"]["limits"]["nvidia.com/gpu"] == document["spec"]["slotsPerWorker"]


def test_what_is_asked_for_is_in_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes", "2", "--gpus", "4", "--image", "mine:1", "--name", "sums", "--folder", "/code"]
    volumes = ["--volume", "claim:/shared", "--volume", "other:runs/1b"]
    more = ["--shm-gb", "3", "--restarts", "5", "--env", "NCCL_SOCKET_IFNAME=ib0", "run_dir=/shared/my run"]
    _, job = rendered(capsys, "job", *options, *volumes, *more)
    (pod,) = pods(job)
    (container,) = pod["containers"]
    assert (job["spec"]["completions"], job["spec"]["backoffLimit"]) == (2, 10)
    assert (container["image"], container["workingDir"]) == ("mine:1", "/code")
    assert {"name": "NCCL_SOCKET_IFNAME", "value": "ib0"} in container["env"]
    assert {"name": "other", "mountPath": "/code/runs/1b"} in container["volumeMounts"]
    assert script_of(pod).startswith("seq -f 'sums-%g.sums slots=4' 0 1 ")
    assert script_of(pod).endswith("\\\n  -- 'run_dir=/shared/my run'\n")
    kubernetes_validate.validate(job, NEWEST, strict=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "3"], "not a multiple of 24 ranks"),
        (["--nodes", "0"], "--nodes 0: must be at least 1"),
        (["run_dir=/elsewhere"], "run_dir=/elsewhere: /elsewhere is on none of the volumes, at /tidal/runs"),
        (["--volume", "runs"], "--volume runs: write CLAIM:PATH"),
        (["--env", "NCCL_DEBUG"], "--env NCCL_DEBUG: write NAME=VALUE"),
        (["--config", "none.yaml"], "no such configuration file"),
    ],
)
def test_what_cannot_run_is_not_rendered(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["job", *arguments]) == 2
    output = capsys.readouterr()
    assert words in output.err
    assert output.out == ""


def test_shards_in_an_object_store_need_no_volume(capsys: pytest.CaptureFixture[str]) -> None:
    assert rendered(capsys, "job", "data.shards=s3://bucket/1b")


def test_the_slurm_script_is_of_the_same_source() -> None:
    text = SBATCH.read_text()
    assert re.findall(r"^#SBATCH (.*)$", text, flags=re.MULTILINE) == sbatch_directives()
    for words in node_arguments("'$hostfile'", r"\\\$SLURM_NODEID", "$first", "$port"):
        assert words in text
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    assert shellcheck(SBATCH) == ""


def test_the_example_of_a_hostfile() -> None:
    assert read_hostfile(ROOT / "launch" / "hostfile.example") == [Host("node1", 8), Host("node2", 8)]
