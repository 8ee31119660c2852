"""Which rank was the first to go, from what launchers and ranks write."""

from pathlib import Path

import pytest

from tidal_dist.cluster.failures import Death, account, death_in, how
from tidal_dist.cluster.logs import log_file
from tidal_dist.cluster.placement import Placement
from tidal_dist.training.interrupts import SIBLING_GONE

LAUNCH = "[2026-11-25 22:59:30,541] [ERROR] [launch.py:259:sigkill_handler] ['python', '-u', 'launch/train.py'] "
FOUR = Placement({"alpha": (0, 1), "beta.cluster": (0, 1)})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"beta: {LAUNCH}exits with return code = -9", Death("beta", None, -9)),
        (f"{LAUNCH}exits with return code = 2", Death(None, None, 2)),
        ("pdsh@alpha: beta: ssh exited with exit code 247", Death("beta", None, -9)),
        ("pdsh@alpha: beta: ssh exited with exit code 1", Death("beta", None, 1)),
        (
            "pdsh@alpha: beta: ssh exited with exit code 255",
            Death("beta", text="is lost (ssh exited with exit code 255)"),
        ),
        ("srun: error: beta: task 3: Killed", Death("beta", 3, text="is lost (Killed)")),
        (
            "mpirun noticed that process rank 3 with PID 0 on node beta exited on signal 9 (Killed).",
            Death("beta", 3, -9),
        ),
        (
            "srun: error: beta: tasks 2-3: Exited with exit code 1",
            Death("beta", 2, 1, "is lost (Exited with exit code 1)"),
        ),
        ("beta: step 3: loss 5.4 exits with return code = 1", None),
        ("beta: [2026-11-25 22:56:24,331] [INFO] [launch.py:285:main] Process 23 exits successfully.", None),
    ],
)
def test_what_launchers_write(line: str, expected: Death | None) -> None:
    assert death_in(line) == expected


@pytest.mark.parametrize(
    ("death", "expected"),
    [
        (Death(code=-9), "was killed by SIGKILL (out of memory, or killed by hand)"),
        (Death(code=134), "was killed by SIGABRT"),
        (Death(code=3), "ended with exit code 3"),
        (Death(text="is lost (no answer)"), "is lost (no answer)"),
    ],
)
def test_how_it_ended(death: Death, expected: str) -> None:
    assert how(death) == expected


def write_logs(run: Path, *last: str) -> None:
    for rank, line in enumerate(last):
        path = log_file(run, rank, "node")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"=== an earlier start\nfirst words\n=== now: rank {rank} starts\nstep 1\n{line}\n")


def test_the_one_that_the_others_follow_from_is_named(tmp_path: Path) -> None:
    """The launcher tells the host, and another rank's command; those that ended since it is gone have said so."""
    write_logs(tmp_path, "error: rank 0: lost contact (x)", f"rank 1: {SIBLING_GONE}", f"rank 2: {SIBLING_GONE}", "oh")
    found = [Death("alpha", None, 1), Death("beta", None, -9)]
    who, *lines = account(found, FOUR, tmp_path)
    assert who.startswith("rank 3 on beta.cluster was killed by SIGKILL (out of memory, or killed by hand); its last")
    assert lines == ["  | step 1", "  | oh"]


def test_addresses_are_told_apart(tmp_path: Path) -> None:
    placement = Placement({"10.0.0.1": (0,), "10.0.0.2": (0,)})
    assert account([Death("10.0.0.2", code=1)], placement, tmp_path) == ["rank 1 on 10.0.0.2 ended with exit code 1"]


def test_where_no_log_tells_the_launchers_word_counts(tmp_path: Path) -> None:
    assert account([Death("beta", None, 1)], FOUR, tmp_path) == [
        "rank 2 on beta.cluster has ended (the launcher there: a rank ended with exit code 1)"
    ]
    alone = Placement({"alpha": (0,)})
    assert account([Death(None, None, 1)], alone, tmp_path) == ["rank 0 on alpha ended with exit code 1"]
    write_logs(tmp_path, *["lost contact (x)"] * 4)
    assert account([Death("alpha", 1, text="has ended without a word")], FOUR, tmp_path)[0].startswith(
        "rank 1 on alpha"
    )
