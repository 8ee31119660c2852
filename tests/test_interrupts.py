"""What asks a rank to stop: signals, a time limit, the end of a Slurm job; and how it gets out of a wait."""

import signal
import subprocess
import sys
import time

import pytest

from tests.launching import ROOT, environment
from tidal_dist.training import interrupts as module
from tidal_dist.training.interrupts import SIBLING_GONE, Interrupts, Meeting, Stopped


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    monotonic = time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.delenv(module.JOB_STARTED, raising=False)
    return clock


def test_a_time_limit_leaves_time_for_what_has_to_be_done(clock: Clock) -> None:
    interrupts = Interrupts()
    interrupts.limit_time(10.0, {})
    for _ in range(20):
        clock.now += 10
        assert not interrupts.asked()
    with interrupts.saving():
        clock.now += 40
    # 600 s: 30 to spare, half as long again as the longest save, twice the longest pause between two questions.
    last = 1000 + 600 - 30 - 1.5 * 40 - 2 * 10
    while clock.now + 10 <= last:
        clock.now += 10
        assert not interrupts.asked()
    clock.now += 10
    assert interrupts.asked()
    assert interrupts.reason == "time limit of 10 minutes"


@pytest.mark.usefixtures("clock")
def test_the_time_of_a_job_that_was_started_again_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(module.JOB_STARTED, "350.0")
    interrupts = Interrupts()
    interrupts.limit_time(10.0, {})
    assert interrupts.reason == "time limit of 10 minutes"


def test_the_end_of_a_slurm_job(clock: Clock) -> None:
    interrupts = Interrupts()
    interrupts.limit_time(None, {"SLURM_JOB_END_TIME": "1100"})
    assert interrupts.reason is None
    clock.now = 1041
    assert interrupts.reason == "end of the Slurm job"
    clock.now = 1000  # once there is a reason, it stays
    assert interrupts.reason == "end of the Slurm job"


def test_without_limits_time_does_not_matter(clock: Clock) -> None:
    interrupts = Interrupts()
    interrupts.limit_time(None, {})
    clock.now = 1e12
    assert not interrupts.asked()


def test_all_ranks_stop_where_one_wants_to() -> None:
    met = []
    wish = {"stop": False}
    meeting = Meeting(Interrupts(), lambda **flags: flags | wish, lambda: met.append(1))
    assert meeting.agree(bad_shard=True) == {"stop": False, "bad_shard": True}
    assert [meeting.any_rank(), meeting.any_rank(True)] == [False, True]
    wish["stop"] = True
    with pytest.raises(Stopped):
        meeting.any_rank(True)
    assert len(met) == 4


RANK = """
import sys, threading, time
from tidal_dist.training.interrupts import Interrupts, WaitBroken
interrupts = Interrupts()
interrupts.listen()
print("ready", flush=True)
if sys.argv[1] == "waits for data":
    try:
        with interrupts.breakable():
            threading.Event().wait(100)
    except WaitBroken:
        print("broken", interrupts.reason, flush=True)
elif sys.argv[1] == "is stuck":
    while interrupts.reason is None:
        time.sleep(0.01)
    print(interrupts.reason, flush=True)
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
elif sys.argv[1] == "loops":
    while interrupts.reason is None:
        time.sleep(0.01)
    time.sleep(float(sys.argv[2]))
    print("saved after", interrupts.reason, flush=True)
"""


def rank(*what: str, **variables: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, *what],
        env=environment() | variables,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", module.STOP_SIGNALS)
def test_a_wait_for_data_is_broken_off(number: signal.Signals) -> None:
    with rank("waits for data") as process:
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, f"broken {number.name}\n")
    assert f"{number.name}: saving and stopping; once more ends at once, without saving" in errors


@pytest.mark.slow
def test_a_second_signal_ends_a_rank_that_is_stuck() -> None:
    with rank("is stuck") as process:
        process.send_signal(signal.SIGUSR1)
        assert process.stdout
        assert process.stdout.readline() == "SIGUSR1\n"
        time.sleep(2.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM again: ended at once" in errors


def test_one_request_on_several_ways_is_one() -> None:
    with rank("loops", "1") as process:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # as Ctrl-C under launchers
            process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.startswith("saved after SIG")


@pytest.mark.slow
def test_the_launcher_is_obeyed_once_and_at_once_where_a_rank_has_failed() -> None:
    # This process plays the launcher of two ranks.
    with rank("loops", "4", LOCAL_SIZE="1") as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(2.5)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "saved after SIGTERM from the launcher\n")
    with rank("is stuck", LOCAL_SIZE="99") as process:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + signal.SIGTERM, f"rank 0: {SIBLING_GONE}\n")
