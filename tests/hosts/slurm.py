"""A Slurm of the hosts of a cluster: real daemons, which end with the hosts."""

import shutil
import time

from tests.hosts.cluster import Cluster
from tests.hosts.namespaces import PATH, START_SECONDS

PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch")

_CONFIGURATION = """
ClusterName=tidal
SlurmctldHost={first}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/%h.pid
SlurmdLogFile={folder}/%h.log
SlurmdSpoolDir={folder}/%h
GresTypes=gpu
NodeName={names} CPUs=1 Gres=gpu:1
PartitionName=all Nodes=ALL Default=YES
"""


def missing() -> str | None:
    """Which of Slurm's programs are not here; none: all are."""
    return ", ".join(name for name in PROGRAMS if not shutil.which(name, path=PATH)) or None


def start_slurm(cluster: Cluster) -> dict[str, str]:
    """Have Slurm run on all hosts, each with a processor and a GPU that is none; the variables its commands need."""
    folder = cluster.folder / f"slurm-{time.monotonic_ns()}"
    (folder / "state").mkdir(parents=True)
    first, names = cluster.hosts[0], ",".join(cluster.hosts)
    configuration = folder / "slurm.conf"
    configuration.write_text(_CONFIGURATION.format(first=first, names=names, folder=folder))
    (folder / "gres.conf").write_text("AutoDetect=off\nName=gpu File=/dev/zero\n")
    variables = {"SLURM_CONF": str(configuration)}
    for host, program in [(first, "slurmctld"), *((host, "slurmd") for host in cluster.hosts)]:
        started = cluster.run(host, [program], env=variables)
        assert started.returncode == 0, started.stderr
    deadline = time.monotonic() + START_SECONDS
    state = ["sinfo", "--noheader", "--Node", "--format=%t"]
    while (seen := cluster.run(first, state, env=variables).stdout.split()) != ["idle"] * len(cluster.hosts):
        assert time.monotonic() < deadline, seen
        time.sleep(0.1)
    return variables
