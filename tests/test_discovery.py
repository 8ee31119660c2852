"""Which rank a process is, by the variables of each launcher, and how ranks meet that nobody has told where."""

import json
import os
import socket
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tidal_dist.cluster import discovery
from tidal_dist.cluster.discovery import Place, discover, place
from tidal_dist.cluster.network import interface_to
from tidal_dist.errors import UserError
from tidal_dist.launching import free_port

DEEPSPEED = {"RANK": 5, "LOCAL_RANK": 1, "WORLD_SIZE": 8, "LOCAL_SIZE": 4, "MASTER_ADDR": "a", "MASTER_PORT": 1}
TORCHRUN = {"RANK": 5, "LOCAL_RANK": 1, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": 5,
    "OMPI_COMM_WORLD_LOCAL_RANK": 1,
    "OMPI_COMM_WORLD_SIZE": 8,
    "OMPI_COMM_WORLD_LOCAL_SIZE": 4,
}
MVAPICH = {name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items()}
HYDRA = {"PMI_RANK": 5, "PMI_SIZE": 8, "MPI_LOCALRANKID": 1, "MPI_LOCALNRANKS": 4}
SRUN = {"SLURM_PROCID": 5, "SLURM_LOCALID": 1, "SLURM_STEP_NUM_TASKS": 8, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
# What a daemon of mpirun inherits where it was itself started by srun, one on each node.
DAEMON = {"SLURM_PROCID": 1, "SLURM_LOCALID": 0, "SLURM_STEP_NUM_TASKS": 2, "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
BATCH_SCRIPT = {"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NTASKS": 8}


def text(variables: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in variables.items()}


@pytest.mark.parametrize(
    "variables",
    [
        DEEPSPEED,
        TORCHRUN,
        OPEN_MPI,
        MVAPICH,
        HYDRA,
        SRUN,
        SRUN | DEEPSPEED,
        DAEMON | OPEN_MPI,
        DAEMON | HYDRA,
        SRUN | {"PMI_RANK": 5, "PMI_SIZE": 8},  # srun --mpi=pmi2
    ],
)
def test_every_launcher_tells_the_place(variables: dict[str, Any]) -> None:
    assert place(text(variables)) == Place(5, 1, 8, 4)


def test_what_is_not_told() -> None:
    assert place({}) is place(text(BATCH_SCRIPT)) is place({"OMPI_COMM_WORLD_RANK": "1"}) is None
    uneven = place(text(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4,3(x2)"}))
    assert uneven == Place(5, 1, 8, None)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment of which every change is undone, without what a launcher says."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in (*DEEPSPEED, *TORCHRUN, "GLOO_SOCKET_IFNAME"):
        os.environ.pop(name, None)
    return monkeypatch


def test_alone(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:  # noqa: ARG001
    discover(tmp_path)
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] == [*"0011"]
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert int(os.environ["MASTER_PORT"]) > 1024
    assert not list(tmp_path.iterdir())


def test_what_the_launcher_says_stays(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:  # noqa: ARG001
    os.environ |= text(DEEPSPEED | {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "mine"})
    discover(tmp_path)
    assert {name: os.environ[name] for name in DEEPSPEED} == text(DEEPSPEED | {"MASTER_ADDR": "127.0.0.1"})
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
    assert os.environ["LOCAL_WORLD_SIZE"] == "4"


def test_gloo_takes_the_network_that_leads_to_the_first_rank(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare.setattr(discovery, "interface_to", {"there": "ib0"}.get)
    os.environ |= text(DEEPSPEED | {"MASTER_ADDR": "there"})
    discover(tmp_path)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_ranks_meet_through_the_run_folder(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where an earlier launch that was killed has left its note."""
    bare.setattr(discovery, "_TRY_SECONDS", 0.2)
    run = tmp_path / "run"
    run.mkdir()
    (run / ".meeting").write_text(json.dumps({"token": "old", "port": free_port(), "addresses": ["127.0.0.1"]}))
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(discovery._meet, run, Place(rank, 0, 4, 1)) for rank in (1, 2, 3)]
        time.sleep(0.1)
        address, port = discovery._meet(run, Place(0, 0, 4, 1))
        assert [future.result() for future in others] == [(address, port)] * 3
    assert interface_to(address) is not None
    with socket.create_server((address, port)):  # free for the ranks
        pass
    assert not list(run.iterdir())


def test_ranks_that_do_not_meet_say_what_to_do(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare.setattr(discovery, "_MEET_SECONDS", 0.3)
    bare.setattr(discovery, "_TRY_SECONDS", 0.1)
    os.environ |= text(OPEN_MPI)
    with pytest.raises(UserError, match=r"^rank 5: rank 0 is not met through .*/\.meeting \(it has left no note\); "):
        discover(tmp_path)
    old = {"token": "old", "port": free_port(), "addresses": ["127.0.0.1"]}
    (tmp_path / ".meeting").write_text(json.dumps(old))
    with pytest.raises(UserError, match=rf"\(port {old['port']} of 127.0.0.1 is not reached\); .* MASTER_ADDR"):
        discover(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
    os.environ["OMPI_COMM_WORLD_RANK"] = "0"
    with pytest.raises(UserError, match=r"^rank 0: 7 of 8 ranks have not come within 0.3 s; is .* shared by all"):
        discover(tmp_path)
    assert not list(tmp_path.iterdir())


def commands(launcher: str, hostfile: Path) -> list[list[str]]:
    """What the processes are that DeepSpeed starts through a launcher, on two hosts with two slots: their variables
    as `NAME=value`, then the program."""
    from deepspeed.launcher.runner import LAUNCHER_CLASSES

    arguments = Namespace(
        **{"include": "", "exclude": "", "num_nodes": -1, "num_gpus": -1, "launcher": launcher, "launcher_args": ""},
        **{"no_python": False, "module": False, "bind_cores_to_rank": False, "bind_core_list": None},
        **{"hostfile": str(hostfile), "master_addr": "10.0.0.1", "master_port": 29500},
        **{"user_script": "launch/train.py", "user_args": ["--config", "c.yaml"]},
    )
    runner = LAUNCHER_CLASSES[launcher](arguments, "", {"red": 2, "blue": 2})
    words = runner.get_cmd({}, {"red": [0, 1], "blue": [0, 1]})
    parts = [[]]
    for word in words:
        parts.append([]) if word == ":" else parts[-1].append(word)
    return parts


def variables_of(words: list[str]) -> dict[str, str]:
    pairs = [(words[n + 1], words[n + 2]) for n, word in enumerate(words) if word in ("-genv", "-env", "-x")]
    return {name.partition("=")[0]: name.partition("=")[2] or value for name, value in pairs}


def test_what_deepspeed_starts_through_intel_mpi_has_its_place(tmp_path: Path) -> None:
    first, *others = commands("impi", tmp_path / "hosts")
    shared = variables_of(first)
    found = [place(shared | variables_of(words)) for words in (first, *others)]
    assert found == [Place(0, 0, 4, 2), Place(1, 1, 4, 2), Place(2, 0, 4, 2), Place(3, 1, 4, 2)]
    assert (shared["MASTER_ADDR"], shared["MASTER_PORT"]) == ("10.0.0.1", "29500")


@pytest.mark.parametrize("launcher", ["openmpi", "mvapich", "slurm"])
def test_what_deepspeed_starts_through_others_must_find_its_place(launcher: str, tmp_path: Path) -> None:
    """If DeepSpeed comes to tell the rank or the address, this shows it, and the meeting can go."""
    (words,) = commands(launcher, tmp_path / "hosts")
    assert words[-4:] == ["-u", "launch/train.py", "--config", "c.yaml"]
    assert not set(variables_of(words)) & set(DEEPSPEED)
