"""The rehearsal without its launches: where ranks stand, what is compared, what is said."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.launching import tidal_error, write_config
from tidal_dist.cluster.placement import Placement, on_hosts
from tidal_dist.drill.compare import compare_loading, compare_losses, compare_tensors, first_difference
from tidal_dist.drill.evidence import newest_step, recorded_losses, rolling_hashes, tensor_digests
from tidal_dist.drill.rehearsal import _Rehearsal
from tidal_dist.drill.report import Report
from tidal_dist.errors import CheckpointError, UserError
from tidal_dist.history.log import Line, RollingLog
from tidal_dist.launching import Launch

HOSTS = "# the job's\nred slots=4\n\nblue slots=4\nold slots=2\n"


def hostfile(folder: Path, text: str = HOSTS) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("", "", {"red": (0, 1, 2, 3), "blue": (0, 1, 2, 3), "old": (0, 1)}),
        ("blue@red:1,3", "", {"red": (1, 3), "blue": (0, 1, 2, 3)}),
        ("", "old@red:0", {"red": (1, 2, 3), "blue": (0, 1, 2, 3)}),
    ],
)
def test_slots_are_chosen_as_the_launcher_chooses_them(
    tmp_path: Path, include: str, exclude: str, expected: dict[str, tuple[int, ...]]
) -> None:
    placement = on_hosts(hostfile(tmp_path), include, exclude, ("--launcher", "slurm"))
    assert placement.hosts == expected
    arguments = placement.launcher_arguments()
    assert arguments[:2] == ["--hostfile", str(tmp_path / "hosts")]
    assert arguments[-2:] == ["--launcher", "slurm"]
    named = arguments[arguments.index("--include") + 1]
    assert on_hosts(hostfile(tmp_path), named, "", ()).hosts == expected


@pytest.mark.parametrize(
    ("text", "include", "exclude", "expected"),
    [
        ("red slots=4\nblue 4\n", "", "", "hosts:2: 'blue 4': write `host slots=8`"),
        (HOSTS, "green", "", "'green': write host:0,1@other, with hosts of"),
        (HOSTS, "red:0-3", "", "'red:0-3': write host:0,1@other"),
        (HOSTS, "old:0,2", "", "the hostfile gives old no slot 2"),
        (HOSTS, "old", "red", "--include and --exclude: give one of them"),
        (HOSTS, "", "red@blue@old", "no slot is left"),
        ("", "", "", "hosts: names no host"),
    ],
)
def test_wrong_hosts_are_named(tmp_path: Path, text: str, include: str, exclude: str, expected: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        on_hosts(hostfile(tmp_path, text), include, exclude, ())
    assert expected in str(error.value)


@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(1, 48))
def test_another_number_of_ranks_stands_on_the_same_slots(slots: list[int], lanes: int) -> None:
    placement = Placement({f"host{i}": tuple(range(n)) for i, n in enumerate(slots)}, Path("hosts"))
    other = placement.another(lambda n: lanes % n == 0)
    if placement.ranks == 1:
        assert other is None
        return
    assert other is not None  # one rank can stand anywhere, and divides everything
    assert lanes % other.ranks == 0
    assert other.ranks < placement.ranks
    assert len({len(s) for s in other.hosts.values()}) == 1
    for host, chosen in other.hosts.items():
        assert set(chosen) <= set(placement.hosts[host])
    for n in range(other.ranks + 1, placement.ranks):
        assert lanes % n or placement.with_ranks(n) is None


def test_losses_are_compared_digit_for_digit_or_within_a_tolerance() -> None:
    expected = {1: 2.0, 2: 1.0}
    assert compare_losses(expected, {1: 2.0, 2: 1.0}) == ("2 of 2 steps equal", True)
    assert compare_losses(expected, {1: 2.0, 2: 1.0 + 2**-52}) == ("step 2: 1.0000000000000002 instead of 1.0", False)
    assert compare_losses(expected, {1: 2.0, 2: 1.0 + 2**-52}, 1e-4)[1]
    assert not compare_losses(expected, {1: 2.0, 2: 1.001}, 1e-4)[1]
    assert not compare_losses(expected, {1: 2.0, 2: float("nan")}, 1e-4)[1]
    assert compare_losses(expected, {2: 1.0}) == ("steps 1 were not written down", False)


def test_hashes_and_tensors_that_differ_or_lack_are_named() -> None:
    assert first_difference({0: "a" * 64, 3: "b" * 64}, {0: "a" * 64, 3: "b" * 64}) == (
        f"2 of 2 equal, {'b' * 12}",
        True,
    )
    assert first_difference({0: "a", 3: "b", 6: "c"}, {0: "a", 3: "x"}) == ("step 3: x instead of b", False)
    assert first_difference({0: "a"}, {0: "a", 3: "x"}) == ("step 3: x instead of none", False)
    assert compare_tensors({"w": "1", "m": "2"}, {"w": "1", "m": "3"}) == ("1 of 2 differ, the first: m", False)
    assert not compare_tensors({"w": "1"}, {"w": "1", "m": "3"})[1]


def test_only_the_last_resume_counts_and_only_on_the_ranks_that_were_asked_for() -> None:
    here = {"event": "resume", "ranks": 2, "saved_by_ranks": 2, "converted": False, "probe_loss_difference": 0.0}
    there = here | {"ranks": 1, "converted": True}
    assert compare_loading([here, there], 1) == ("converted from 2 ranks, as saved; probe loss 0 apart", True)
    assert compare_loading([{"event": "start"}, here], 2) == ("read as they are, as saved; probe loss 0 apart", True)
    assert not compare_loading([there, here], 1)[1]
    assert not compare_loading([{"event": "start"}], 2)[1]


def test_digests_see_every_bit_of_weights_and_optimizer(tmp_path: Path) -> None:
    def written(name: str, weight: torch.Tensor, step: float) -> dict[str, str]:
        folder = tmp_path / name
        folder.mkdir()
        torch.save({"module": {"w": weight}, "groups": [{"step": step}], "note": name}, folder / "rank_0.pt")
        return tensor_digests(folder)

    weight = torch.arange(6.0).reshape(2, 3).t()  # not contiguous
    first = written("a", weight, 3.0)
    assert set(first) == {"rank_0.pt/module/w", "rank_0.pt/groups/0/step"}
    assert written("b", weight.contiguous(), 3.0) == first
    assert written("c", weight.reshape(2, 3), 3.0) != first
    assert written("d", weight.bfloat16(), 3.0) != first
    assert written("e", weight, 4.0) != first
    nearly = weight.clone()
    nearly[0, 0] = -0.0
    assert written("f", nearly, 3.0) != first
    (tmp_path / "f" / "rank_0.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="cannot read"):
        tensor_digests(tmp_path / "f")
    with pytest.raises(CheckpointError, match="holds no weights"):
        tensor_digests(tmp_path)


def test_losses_are_read_up_to_a_line_that_a_kill_cut_off(tmp_path: Path) -> None:
    (tmp_path / "scalars.jsonl").write_text(
        '{"step": 1, "time": 0, "train/loss": 2.5}\n{"step": 1, "time": 0, "validation/loss": 9}\n{"step": 2, "tr'
    )
    assert recorded_losses(tmp_path) == {1: 2.5}
    (tmp_path / "scalars.jsonl").write_text('{"step": 4, "time": 0, "train/loss": "nan"}\n')
    assert compare_losses({4: 1.0}, recorded_losses(tmp_path)) == ("step 4: nan instead of 1.0", False)


def test_the_newest_step_is_that_of_the_last_whole_line(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    log = RollingLog(tmp_path, Line(0, 0, "0" * 64), Line(0, 0, "0" * 64))
    assert newest_step(tmp_path) == 0
    for step in range(1, 12):
        log.add(Line(step, 1_000_000_000 * step, f"{step:064x}"))
        assert newest_step(tmp_path) == step == max(rolling_hashes(tmp_path))
    with open(tmp_path / "rolling_hash.tsv", "a") as file:
        file.write("12\t8")
    assert newest_step(tmp_path) == 11 == max(rolling_hashes(tmp_path))


def test_it_is_a_go_unless_something_fails() -> None:
    report = Report(seed=7, ranks=2)
    report.add("loss", "equal", "12 of 12 steps equal", True)
    report.add("resumed on other ranks", "as undisturbed", "no other number of ranks fits", None)
    assert report.go
    assert report.as_text().splitlines()[-1] == "GO"
    report.add("rolling hash", "equal", "step 3: x instead of b", False)
    assert not report.go
    assert (
        "rolling hash            equal           step 3: x instead of b         FAILS" in report.as_text().splitlines()
    )
    assert report.as_text().splitlines()[-1] == "NO-GO"
    broken = Report(seed=7, ranks=2, failed={"resumed": "exit code 1: error: it"})
    assert not broken.go
    assert "resumed did not come to its end: exit code 1: error: it" in broken.as_text()
    assert broken.as_object()["go"] is False


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ranks", "2"], "no manifest.json"),
        (["--ranks", "0"], "--ranks 0: must be at least 1"),
        (["--steps", "3"], "--steps 3: must be at least 6"),
        (["--include", "red"], "--include and --exclude choose among the slots of --hostfile"),
        (["--hostfile", "/nowhere/hosts"], "/nowhere/hosts: cannot read"),
        (["--ranks", "2", "--other-ranks", "3"], "data.lanes=4 is not a multiple of 3 ranks"),
        (["model.width=31"], "width 31 is not a multiple of n_heads 2"),
    ],
)
def test_mistakes_end_in_one_line_and_start_nothing(tmp_path: Path, arguments: list[str], expected: str) -> None:
    config = write_config(tmp_path)
    assert expected in tidal_error("drill", config, *arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("of_ranks", "expected"),
    [
        ("error: deepspeed.x=5.0 contradicts training.y", "error: deepspeed.x=5.0 contradicts training.y"),
        ("Traceback (most recent call last):\nValueError: of one rank", "ValueError: of one rank"),
    ],
)
def test_the_reason_of_an_end_is_what_a_rank_says_and_not_its_launcher(
    tmp_path: Path, of_ranks: str, expected: str
) -> None:
    launcher = "[launch.py:335:sigkill_handler] Killing subprocess 7\n[launch.py:341:sigkill_handler] ['python', "
    (tmp_path / "killed.log").write_text(
        f"[launch.py:271:main] spawned\n{of_ranks}\n{launcher}] exits with return code = 2"
    )
    plan: Any = SimpleNamespace(seed=1, steps=6)
    assert _Rehearsal(plan, tmp_path, Report(1, 2), print)._last_words("killed") == expected


# Ignores what asks it to end, as a process that hangs does, and has a child in a session of its own.
STUBBORN = (
    "import signal, subprocess, sys, time; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; "
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', *sys.argv[1:]], start_new_session=True); "
    "print('ready', flush=True); time.sleep(600)"
)


def test_no_process_of_a_launch_outlives_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STUBBORN, "--config", str(tmp_path / "config.yaml")]
    with Launch(command, subprocess.PIPE) as launch:
        assert launch.process.stdout is not None
        assert launch.process.stdout.readline() == "ready\n"
        processes = launch.processes()
        assert len(processes) == 2
        assert launch.process.poll() is None
    assert launch.process.returncode == -signal.SIGKILL
    assert not any(p.is_running() and p.status() != "zombie" for p in processes)


def test_ranks_are_found_beneath_their_launchers_but_not_the_children_of_ranks(tmp_path: Path) -> None:
    train = tmp_path / "train.py"
    train.write_text("import os, time\nos.fork()\nos.write(1, b'ready\\n')\ntime.sleep(600)\n")
    start = (
        "import os, subprocess, sys\n"
        "for r in '01':\n"
        "    told = {'RANK': r, 'LOCAL_RANK': r, 'WORLD_SIZE': '2'}\n"
        "    subprocess.Popen([sys.executable, '-u', *sys.argv[1:]], env=os.environ | told)\n"
        "import time; time.sleep(600)"
    )
    command = [sys.executable, "-c", start, str(train), "--config", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tidal_dist.launching.TRAIN", train)
        with Launch(command, subprocess.PIPE) as launch:
            assert launch.process.stdout is not None
            assert [launch.process.stdout.readline() for _ in range(4)] == ["ready\n"] * 4
            ranks = launch.ranks()
            assert sorted(ranks) == [0, 1]
            launch.kill_rank(1)
            while ranks[1].status() != "zombie":  # nobody waits for it
                time.sleep(0.01)
            assert ranks[0].is_running()
