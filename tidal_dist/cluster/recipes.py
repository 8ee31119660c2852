"""A job as schedulers want it: the header of a Slurm script; a Job, a JobSet or an MPIJob for Kubernetes.

Each node, or pod, starts the ranks of its own through the deepspeed launcher with `--no_ssh`; only the MPIJob reaches
its pods over ssh, from one that launches.
"""

import posixpath
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.ordering import Share
from tidal_dist.cluster.environment import environment_for
from tidal_dist.cluster.hostfile import Host, hostfile_text
from tidal_dist.cluster.supervisor import USER_ERROR
from tidal_dist.config import Config

GRACE_SECONDS = 180  # from the signal to the kill: a step, and a checkpoint
MASTER_PORT = 29500  # of a pod, which has all its ports for itself
_INTERFACE = "eth0"  # as nearly every network plugin calls it inside a pod
_CONTAINER = "train"


@dataclass(frozen=True)
class Volume:
    """A persistent volume claim, and where pods see it: absolute, or within the working folder."""

    claim: str
    path: str


@dataclass(frozen=True)
class Recipe:
    """A job on Kubernetes.

    Attributes:
        config, overrides: of the run. name: of the job. gpus: of each node.
        image: has this repository in `folder`, where it works. volumes: shared by all pods.
        shm_gb: of memory for /dev/shm. restarts: of the whole job. variables: further ones, of each rank.
    """

    config: str = "configs/1b.yaml"
    overrides: tuple[str, ...] = ()
    name: str = "tidal"
    nodes: int = 4
    gpus: int = 8
    image: str = "tidal-dist:latest"
    folder: str = "/tidal"
    volumes: tuple[Volume, ...] = (Volume("tidal-runs", "runs"),)
    shm_gb: int = 16
    restarts: int = 50
    variables: Mapping[str, str] = field(default_factory=dict)

    def path(self, path: str) -> str:
        """Where a path of the configuration lies in a pod."""
        return posixpath.normpath(posixpath.join(self.folder, path))

    def check(self, config: Config) -> None:
        """Raises UserError where ranks, lanes and batch do not fit, or a folder that all pods need is on no volume."""
        ranks = self.nodes * max(self.gpus, 1)
        Share(config.training.batch_rows, config.training.accumulation_steps, 0, ranks).check(config.data.lanes)
        mounts = [self.path(volume.path) for volume in self.volumes]
        for name, path in (("run_dir", config.run_dir), ("data.shards", config.data.shards)):
            place = self.path(path)
            if "://" not in path and not any(place == m or place.startswith(f"{m}/") for m in mounts):
                raise UserError(
                    f"{name}={path}: {place} is on none of the volumes, at {', '.join(mounts)}; "
                    "give --volume CLAIM:PATH, or set another path"
                )


def sbatch_directives(nodes: int = 1, gpus: int = 8, time: str = "24:00:00") -> list[str]:
    """The options at the head of a Slurm script."""
    return [
        "--job-name=tidal",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={gpus}",
        "--exclusive",
        f"--time={time}",
        f"--signal=B:USR1@{GRACE_SECONDS}",
        "--requeue",
        "--open-mode=append",
        "--output=%x-%j.log",
    ]


def node_arguments(hostfile: str, node_rank: str, master: str, port: str) -> list[str]:
    """What the launcher of one node is told; words of a shell."""
    return [
        f"--hostfile {hostfile} --no_ssh --node_rank {node_rank}",
        f"--master_addr {master} --master_port {port}",
    ]


def job(recipe: Recipe, config: Config) -> list[dict[str, Any]]:
    """An indexed Job, whose pods start again one by one, and the headless Service by which they find each other."""
    pods = _indexed(recipe, config, f"{recipe.name}-%g.{recipe.name}", recipe.restarts * recipe.nodes)
    pods["template"]["spec"]["subdomain"] = recipe.name
    # A pod that its node has lost is no failure of the job.
    lost = {"type": "DisruptionTarget", "status": "True"}
    pods["podFailurePolicy"]["rules"].append({"action": "Ignore", "onPodConditions": [lost]})
    selector = {"batch.kubernetes.io/job-name": recipe.name}
    service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": selector}
    return [_object("v1", "Service", recipe, service), _object("batch/v1", "Job", recipe, pods)]


def jobset(recipe: Recipe, config: Config) -> list[dict[str, Any]]:
    """A JobSet: when one pod has failed, all start again together; it makes the Service itself."""
    pods = _indexed(recipe, config, f"{recipe.name}-nodes-0-%g.{recipe.name}", 0)
    policy = {
        "maxRestarts": recipe.restarts,
        "restartStrategy": "BlockingRecreate",
        "rules": [{"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    replicated = {"name": "nodes", "replicas": 1, "template": {"spec": pods}}
    spec = {"failurePolicy": policy, "replicatedJobs": [replicated]}
    return [_object("jobset.x-k8s.io/v1alpha2", "JobSet", recipe, spec)]


def mpijob(recipe: Recipe, config: Config) -> list[dict[str, Any]]:
    """Kubeflow's MPIJob: one pod launches over ssh, and starts again itself; the others run nothing but sshd."""
    words = [
        f"exec tidal launch {shlex.quote(recipe.config)} --hostfile /etc/mpi/hostfile --requeue",
        *([shlex.join(recipe.overrides)] if recipe.overrides else []),
    ]
    launcher = _pod(recipe, config, " \\\n  ".join(words) + "\n", gpus=0)
    spec = {
        "slotsPerWorker": max(recipe.gpus, 1),
        "launcherCreationPolicy": "WaitForWorkersReady",
        "runPolicy": {"cleanPodPolicy": "Running"},
        "mpiReplicaSpecs": {
            "Launcher": {"replicas": 1, "restartPolicy": "Never", "template": {"spec": launcher}},
            "Worker": {"replicas": recipe.nodes, "template": {"spec": _pod(recipe, config, None, recipe.gpus)}},
        },
    }
    return [_object("kubeflow.org/v2beta1", "MPIJob", recipe, spec)]


def _object(version: str, kind: str, recipe: Recipe, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": recipe.name}, "spec": spec}


def _indexed(recipe: Recipe, config: Config, pods: str, failures: int) -> dict[str, Any]:
    """A Job of one pod a node, each of which knows its number, `%g` in its name, with so many failures at most."""
    mistake = {
        "action": "FailJob",
        "onExitCodes": {"containerName": _CONTAINER, "operator": "In", "values": [USER_ERROR]},
    }
    return {
        "completionMode": "Indexed",
        "completions": recipe.nodes,
        "parallelism": recipe.nodes,
        "backoffLimit": failures,
        "podFailurePolicy": {"rules": [mistake]},
        "template": {"spec": _pod(recipe, config, _script(recipe, pods), recipe.gpus)},
    }


def _script(recipe: Recipe, pods: str) -> str:
    """What the shell of a pod runs: it writes the hostfile, and becomes the supervisor of this node's ranks."""
    line = hostfile_text([Host(pods, max(recipe.gpus, 1))]).strip()
    words = [
        f"exec python -m launch.supervise --once --config {shlex.quote(recipe.config)}",
        *node_arguments("/tmp/hostfile", '"$JOB_COMPLETION_INDEX"', pods.replace("%g", "0"), str(MASTER_PORT)),
        *([shlex.join(["--", *recipe.overrides])] if recipe.overrides else []),
    ]
    return f"seq -f '{line}' 0 {recipe.nodes - 1} > /tmp/hostfile\n" + " \\\n  ".join(words) + "\n"


def _pod(recipe: Recipe, config: Config, script: str | None, gpus: int) -> dict[str, Any]:
    """A pod that runs a script, or none of its own, may use so many GPUs of its node, and sees the volumes."""
    environment = environment_for(config, _INTERFACE, {}) | dict(recipe.variables)
    environment.pop("PATH", None)  # as the image has it
    mounts = {"shm": "/dev/shm"} | {volume.claim: recipe.path(volume.path) for volume in recipe.volumes}
    container: dict[str, Any] = {
        "name": _CONTAINER,
        "image": recipe.image,
        "workingDir": recipe.folder,
        **({"command": ["sh", "-c", script]} if script else {}),
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "volumeMounts": [{"name": name, "mountPath": path} for name, path in mounts.items()],
    }
    if gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": gpus}}
    shm = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{recipe.shm_gb}Gi"}}
    claims = [{"name": v.claim, "persistentVolumeClaim": {"claimName": v.claim}} for v in recipe.volumes]
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [container],
        "volumes": [shm, *claims],
    }
