"""`tidal preflight` with hosts that are played: what each of them may have becomes one row with a remedy."""

import ast
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launching import write_config
from tests.played_hosts import SHARED, Played, hostfile_text
from tidal_dist.cluster.job import Request
from tidal_dist.cluster.placement import on_hosts
from tidal_dist.cluster.preflight import node, trial
from tidal_dist.cluster.preflight.report import as_object, as_text
from tidal_dist.cluster.preflight.rounds import rounds
from tidal_dist.cluster.preflight.rows import EVERYWHERE
from tidal_dist.cluster.preflight.run import Report, preflight
from tidal_dist.cluster.transport import AT_ONCE, Result
from tidal_dist.config import load_config

NODE = Path(node.__file__)


@pytest.fixture(autouse=True)
def of_its_own(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder and a home without files for the launcher, and something named pdsh."""
    pdsh = tmp_path_factory.mktemp("bin") / "pdsh"
    pdsh.touch(0o755)
    monkeypatch.setenv("PATH", f"{pdsh.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


def checked(
    folder: Path, played: Played, hosts: int = 3, slots: int = 1, fix: bool = False, at_once: int = AT_ONCE
) -> Report:
    config = write_config(folder, data={"lanes": 3 * 256}, training={"batch_rows": 3 * 256})
    (folder / "hostfile").write_text(hostfile_text(hosts, slots))
    placement = on_hosts(folder / "hostfile", "", "", ())
    request = Request(str(config), load_config(config), [], placement)
    return preflight(request, played, sample=8, together=False, fix=fix, at_once=at_once)


def test_hosts_that_are_well_are_a_go(tmp_path: Path) -> None:
    played = Played()
    report = checked(tmp_path, played)
    assert [row for row in report.rows if row.status != "ok"] == []
    assert report.go
    text = as_text(report)
    assert "go: 3 hosts, 0 failures, 0 warnings" in text
    assert "all hosts  all reach 10.0.0.0 port 29777 by eth0" in text
    assert f"{SHARED} can be written, seen by 3 hosts" in text
    assert played.left == set()
    made = json.loads(json.dumps(as_object(report)))
    assert made["go"] is True
    assert {row["host"] for row in made["rows"]} == {"node0", "node1", "node2", EVERYWHERE}


def sets(*keys: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def edit(facts: dict[str, Any]) -> None:
        for key in keys[:-1]:
            facts = facts[int(key) if key.isdigit() else key]
        facts[keys[-1]] = to

    return edit


GPU = ("gpus", "gpus", "0")
# What node1 has, its check and status, what is said of it and what is to be done.
ODD = {
    "no project": (sets("project", to={"problem": "no package tidal_dist"}), "project", "fail", "no package", "rsync"),
    "project": (sets("project", "hash", to="d" * 64), "project", "fail", "another version: 0.1.0, source ddd", "rsync"),
    "torch": (
        sets("packages", "torch", to="2.12.0"),
        "packages",
        "fail",
        "torch 2.12.0, on most hosts 2.13.0",
        "torch==",
    ),
    "numpy": (
        sets("packages", "numpy", to="1.9"),
        "packages",
        "warn",
        "numpy 1.9, on most hosts 2.0.0",
        "numpy==2.0.0",
    ),
    "lacks": (sets("packages", "numpy", to=None), "packages", "fail", "numpy is missing", "pip install numpy==2.0.0"),
    "extra": (
        sets("packages", "triton", to="3"),
        "packages",
        "warn",
        "triton 3, on most hosts it is missing",
        "uninstall",
    ),
    "import": (sets("torch", to={"problem": "ImportError: libcudart"}), "torch", "fail", "libcudart", "install"),
    "nccl": (sets("torch", "nccl", to="2.20"), "torch", "fail", "NCCL 2.20; on most", "same build"),
    "config": (sets("reads", "config", to="e" * 64), "config", "fail", "is another there: eee", "copy"),
    "no config": (sets("reads", to={"config_problem": "x: no such"}), "config", "fail", "x: no such", "alike"),
    "variable": (
        sets("environment", "NCCL_IB_HCA", to="mlx5"),
        "environment",
        "warn",
        "NCCL_IB_HCA is mlx5",
        "set NCCL",
    ),
    "smi": (sets("gpus", to={"problem": "mismatch"}), "gpus", "fail", "nvidia-smi: mismatch", "driver"),
    "driver": (sets(*GPU, "driver_version", to="1"), "gpus", "warn", "driver 1; on most hosts NVIDIA H100", "driver"),
    "few": (lambda facts: facts["gpus"]["gpus"].pop(), "gpus", "fail", "1 GPUs for 2 slots", "write slots=1"),
    "ecc": (
        sets(*GPU, "ecc.errors.uncorrected.volatile.total", to="3"),
        *("gpu health", "fail", "GPU 0: 3 memory errors", "drain"),
    ),
    "hot": (
        sets(*GPU, "clocks_throttle_reasons.active", to="0x0000000000000048"),
        *("gpu health", "warn", "hardware slowdown, too hot (hardware)", "cooling"),
    ),
    "page": (sets(*GPU, "retired_pages.pending", to="Yes"), "gpu health", "warn", "GPU 0: a memory page", "reboot"),
    "used": (
        sets(*GPU, "memory.used", to="9000"),
        "gpu health",
        "warn",
        "GPU 0: 9.4 GB in use",
        "ssh node1 nvidia-smi",
    ),
    "memory": (sets(*GPU, "memory.used", to="81000"), "memory", "fail", "predicted (GPU 0)", "tidal plan"),
    "disk": (sets("disks", "run folder", "free", to=1000), "disks", "fail", "a checkpoint takes", "another run_dir"),
    "tight": (sets("disks", "run folder", "free", to=1_500_000), "disks", "warn", "5 stand at most", "another run_dir"),
    "shm": (sets("disks", "shared memory", "free", to=64_000_000), "disks", "warn", "64.0 MB free", "--shm-size"),
    "mount": (
        sets("disks", "run folder", to={"folder": "/x", "problem": "Stale file handle"}),
        *("disks", "fail", "run folder (/x): Stale", "mount it"),
    ),
    "full": (
        sets("run_folder", "problem", to="No space left on device"),
        *("run folder", "fail", f"cannot write to {SHARED} (No space left on device)", "make room"),
    ),
    "shards": (sets("reads", "shards", to="f" * 64), "shards", "fail", "other shards: manifest fff", "copy the shards"),
    "torn": (sets("reads", "shards_problem", to="train/shard-0: torn"), "shards", "fail", "shard-0: torn", "copy"),
}


@pytest.mark.parametrize("case", ODD)
def test_the_odd_one_out_is_named_with_a_remedy(case: str, tmp_path: Path) -> None:
    edit, check, status, what, remedy = ODD[case]
    report = checked(tmp_path, Played(gpus=2, edits={"node1": edit}), slots=2)
    found = [row for row in report.rows if row.check == check and row.status != "ok"]
    assert [(row.host, row.status) for row in found] == [("node1", status)], found
    assert what in found[0].what
    assert remedy in found[0].remedy
    assert report.go == (status == "warn")
    others = [r for r in report.rows if r.check == check and r.host in ("node0", "node2")]
    assert {row.status for row in others} <= {"ok"}


def failed(host: str, problem: str | None = None, code: int | None = None, err: str = "") -> Result:
    return Result(host, code, "", err, 1.0, problem)


# What becomes of the tasks of node1, the check that fails, and what is said.
LOST = {
    "gone": ("clock", failed("node1", "does not resolve; correct it"), "ssh", "does not resolve"),
    "no Python": ("clock", failed("node1", code=127, err="sh: no such file"), "python", "does not start (sh: no such"),
    "hangs": ("look", failed("node1", "no answer within 75 s; look", err="doing a\ndoing disk /x\n"), "probe", "/x)"),
    "no folder": ("look", failed("node1", code=81, err="cd: no"), "project", "no folder"),
    "crash": ("look", failed("node1", code=1, err="doing gpus\nKeyError: 1\n"), "probe", "(KeyError: 1) at gpus"),
    "late": ("find", failed("node1", "went away in the middle; look"), "probe", "went away"),
}


@pytest.mark.parametrize("case", LOST)
def test_a_host_that_is_lost_at_any_time_is_one_row_and_the_others_are_looked_at(case: str, tmp_path: Path) -> None:
    task, result, check, what = LOST[case]
    played = Played(answers={("node1", task): result})
    report = checked(tmp_path, played)
    assert [(row.host, row.check) for row in report.failed] == [("node1", check)]
    assert what in report.failed[0].what
    assert report.failed[0].remedy
    assert {row.host for row in report.rows if row.check == "shards"} >= {"node0", "node2"}
    assert played.left == set()
    assert "no-go: 3 hosts, 1 failures" in as_text(report)


def test_all_hosts_may_be_gone(tmp_path: Path) -> None:
    problem = "has a host key that is not known here; `ssh-keyscan -H {host} >> ~/.ssh/known_hosts`"
    hosts = [f"node{n}" for n in range(3)]
    played = Played(answers={(host, "clock"): failed(host, problem.format(host=host)) for host in hosts})
    text = as_text(checked(tmp_path, played))
    assert "-H node0 node1 node2 >>" in text
    assert "no-go" in text


@pytest.mark.parametrize("off", [-300.0, 300.0])
def test_clocks_are_compared_with_most_hosts(off: float, tmp_path: Path) -> None:
    report = checked(tmp_path, Played(clocks={"node1": off}))
    assert [(row.host, row.check, row.what[:6]) for row in report.failed] == [("node1", "clock", f"{off:+.1f}")]
    # Here it is ours that is wrong, and that of node1 too.
    report = checked(tmp_path, Played(clocks={"node0": off, "node2": off}))
    assert [row.host for row in report.failed] == ["node1"]


def test_another_python_is_told_from_a_newer_patch(tmp_path: Path) -> None:
    report = checked(tmp_path, Played(pythons={"node1": "3.9.2", "node2": "3.11.9"}))
    assert [(r.host, r.status) for r in report.rows if r.check == "python" and r.status != "ok"] == [
        ("node1", "fail"),
        ("node2", "warn"),
    ]


def test_a_run_folder_of_the_same_name_is_not_a_shared_one(tmp_path: Path) -> None:
    report = checked(tmp_path, Played(apart={"node1"}))
    assert [(row.host, row.check) for row in report.failed] == [("node1", "run folder")]
    assert "mount the same file system" in report.failed[0].remedy


def test_an_interrupted_preflight_leaves_no_file(tmp_path: Path) -> None:
    def interrupt(_: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    played = Played(edits={"node1": interrupt})
    with pytest.raises(KeyboardInterrupt):
        checked(tmp_path, played, hosts=2)
    assert [name for _, name in played.asked].count("look") == 2
    assert played.left == set()


def test_a_run_that_cannot_be_laid_out_is_a_no_go(tmp_path: Path) -> None:
    report = checked(tmp_path, Played(), hosts=5)
    assert [(row.host, row.check) for row in report.failed] == [(EVERYWHERE, "layout")]
    assert "do not divide data.lanes" in report.failed[0].what


def test_all_of_256_hosts_are_asked_everything(tmp_path: Path) -> None:
    played = Played()
    report = checked(tmp_path, played, hosts=256)
    assert report.go, report.failed
    assert played.most <= AT_ONCE
    for task, hosts in (("clock", 256), ("look", 256), ("find", 256), ("reach", 255)):
        assert len({host for host, asked in played.asked if asked == task}) == hosts
    assert len(as_text(report).splitlines()) < 40


@pytest.mark.slow
@pytest.mark.parametrize("task", ["clock", "look", "find", "reach"])
def test_only_so_many_hosts_are_asked_at_the_same_time(task: str, tmp_path: Path) -> None:
    played = Played(seconds={task: 0.1})
    assert checked(tmp_path, played, hosts=16, at_once=5).go
    assert 1 < played.most <= 5


def test_without_the_launcher_below_there_is_no_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    report = checked(tmp_path, Played())
    assert [(row.host, row.check) for row in report.failed] == [(EVERYWHERE, "launcher")]
    assert "install pdsh" in report.failed[0].remedy


def test_fix_writes_the_file_of_the_launcher_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_SOMETHING", "1")
    before = set(tmp_path.rglob("*"))
    assert "TORCH_SOMETHING" in as_text(checked(tmp_path, Played()))
    assert not (tmp_path / ".deepspeed_env").exists()
    report = checked(tmp_path, Played(), fix=True)
    assert report.written == [str(tmp_path / ".deepspeed_env")]
    assert "TORCH_SOMETHING=1\n" in (tmp_path / ".deepspeed_env").read_text()
    made = {path.name for path in set(tmp_path.rglob("*")) - before}
    assert made == {".deepspeed_env", "config.yaml", "hostfile"}
    assert checked(tmp_path, Played(), fix=True).written == []


def test_every_pair_meets_once_in_few_rounds() -> None:
    for n in range(1, 20):
        found = rounds(n)
        assert sorted(itertools.chain(*found)) == list(itertools.combinations(range(n), 2))
        assert len(found) <= n
        for pairs in found:
            assert len(set(itertools.chain(*pairs))) == 2 * len(pairs)


def test_the_slow_host_and_a_checkpoint_that_does_not_come_back_are_rows() -> None:
    by_host = {"node0": 10.0, "node1": 2.0, "node2": 10.0}
    slowest = [{"pair": ["node0", "node1"], "gb_per_second": 2.0}]
    pairs = {"count": 3, "median_gb_per_second": 10.0, "slowest": slowest, "median_by_host": by_host}
    rates = {"all_reduce_gb_per_second": 1.0, "all_gather_gb_per_second": 1.0}
    saved = {"problem": "rank 1 cannot read what rank 2 has written"}
    found = {"ranks": 3, "backend": "nccl", "message_bytes": 64 << 20, "pairs": pairs, "checkpoint": saved, **rates}
    rows = list(trial.rows(found))
    assert [(row.host, row.check, row.status) for row in rows] == [
        (EVERYWHERE, "collective", "ok"),
        (EVERYWHERE, "pairs", "warn"),
        ("node1", "pairs", "warn"),
        (EVERYWHERE, "checkpoint", "fail"),
    ]
    assert "slowest node0 - node1 with 2.00 GB/s" in rows[1].what


SMI = f"""#!{sys.executable}
import sys
known = {{"index": "0", "name": "NVIDIA H100", "memory.total": "81559", "memory.used": "3", "driver_version": "570",
         "clocks_throttle_reasons.active": "0x1"}}
fields = sys.argv[1].removeprefix("--query-gpu=").split(",")
for field in fields:
    if field not in known:
        sys.exit(f'Field "{{field}}" is not a valid field to query.')
print(", ".join(known[field] for field in fields))
"""


def test_a_host_says_of_itself_what_is_asked_and_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("HF_")]:  # some libraries set some
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN", "hidden")
    monkeypatch.setenv("HF_HOME", "/models")
    monkeypatch.setattr(node, "_TORCH", "print('{}')")
    request = {
        "script": str(NODE),
        "packages": ["numpy", "no-such-package"],
        "variables": ["HF_*"],
        "secrets": ["*TOKEN"],
        "run_dir": str(tmp_path / "not" / "there"),
        "folders": {},
        "reads": ["-c", "import os; os._exit(7)"],
        "token": ".preflight-token",
    }
    found = node.look(json.dumps(request))
    assert found["environment"] == {"HF_HOME": "/models"}
    assert "hidden" not in json.dumps(found)
    assert found["packages"]["no-such-package"] is None
    assert found["packages"]["numpy"]
    assert [sorted(gpu) for gpu in found["gpus"]["gpus"]] == [
        ["clocks_throttle_reasons.active", "driver_version", "index", "memory.total", "memory.used", "name"]
    ]
    assert found["reads"] == {"problem": "exit code 7"}
    assert len(found["project"]["hash"]) == 64
    assert found["run_folder"] == {"folder": str(tmp_path)}
    assert node.find(str(tmp_path), ".preflight-token", "other") == {"seen": [".preflight-token"]}
    node.forget(str(tmp_path), ".preflight-token", "other")
    assert {path.name for path in tmp_path.iterdir()} == {"nvidia-smi"}


def test_what_goes_to_hosts_runs_on_an_old_python_with_nothing_installed() -> None:
    tree = ast.parse(NODE.read_text("utf-8"), feature_version=(3, 8))
    imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {str(n.module).split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported <= set(sys.stdlib_module_names)
