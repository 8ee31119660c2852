"""Commands on other hosts, with an ssh that is played: what it says becomes a line with a remedy, and nothing hangs."""

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from data_pipeline.errors import UserError
from tidal_dist.cluster.transport import Result, Ssh, is_this_machine, run_on_all

ELSEWHERE = "192.0.2.7"  # an address that no machine has
ECHO = (sys.executable, "-c", "import sys; print('heard', sys.stdin.read()); sys.exit(3)")


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program named ssh, to be written by the test, found first."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "ssh"


def write(program: Path, script: str) -> None:
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", os.uname().nodename])
def test_this_machine_is_reached_without_ssh(host: str, play: Path) -> None:
    write(play, "exit 99")
    assert is_this_machine(host)
    result = Ssh().run(host, ECHO, stdin="a word", timeout=20)
    assert (result.code, result.out, result.problem) == (3, "heard a word\n", None)
    assert Ssh(also_to_this_machine=True).run(host, ECHO, timeout=20).code == 99


def test_a_command_arrives_on_another_host_word_by_word(play: Path) -> None:
    write(play, 'for last; do :; done; echo "$@" >&2; exec sh -c "$last"')
    result = Ssh(port=2222, options=("-i", "key")).run(
        ELSEWHERE, ["printf", "<%s>", "a b", "$HOME", "it's"], timeout=20
    )
    assert (result.code, result.out, result.problem) == (0, "<a b><$HOME><it's>", None)
    assert "BatchMode=yes" in result.err
    assert f"-p 2222 -i key {ELSEWHERE} printf" in result.err


SAID = {
    "ssh: Could not resolve hostname nodeX: Name or service not known": ("does not resolve", "/etc/hosts"),
    "ssh: connect to host node1 port 22: Connection refused": ("refuses", "sshd"),
    "root@node1: Permission denied (publickey,password).": ("without a password", "ssh-copy-id"),
    "No ED25519 host key is known for node1 and you have requested strict checking.\nHost key verification failed.": (
        "not known here",
        "ssh-keyscan",
    ),
    "@  WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!  @\nHost key verification failed.": (
        "another host key",
        "ssh-keygen -R",
    ),
    "ssh: connect to host node1 port 22: No route to host": ("not reached (No route to host)", "firewall"),
    "ssh: connect to host node1 port 22: Connection timed out": ("not reached", "firewall"),
    "kex_exchange_identification: read: Connection reset by peer": ("went away", "journalctl"),
    "Timeout, server 192.0.2.7 not responding.": ("went away", "journalctl"),
    "Bad configuration option: batchmod": ("ssh failed (Bad configuration option: batchmod)", "try `ssh"),
    "": ("went away", "console"),
}


@pytest.mark.parametrize("said", SAID)
def test_what_ssh_says_becomes_one_line_with_a_remedy(said: str, play: Path) -> None:
    write(play, f"cat >&2 <<'END'\n{said}\nEND\nexit 255")
    result = Ssh().run(ELSEWHERE, ["true"], timeout=20)
    assert result.code is None
    assert result.problem is not None
    assert "\n" not in result.problem
    assert all(part in result.problem for part in SAID[said]), result.problem


def test_a_command_that_fails_there_is_no_problem_of_the_host(play: Path) -> None:
    write(play, "echo no such thing >&2; exit 127")
    result = Ssh().run(ELSEWHERE, ["nothing"], timeout=20)
    assert (result.code, result.err.strip(), result.problem) == (127, "no such thing", None)


@pytest.mark.parametrize("host", [ELSEWHERE, "localhost"])
def test_a_host_that_hangs_is_left_with_all_that_was_started(host: str, play: Path, tmp_path: Path) -> None:
    script = f"(sleep 300 & echo $! > {tmp_path}/child; echo begun; wait)"
    write(play, script)
    result = Ssh().run(host, ["sh", "-c", script], timeout=0.5)
    assert result.code is None
    assert result.out == "begun\n"
    assert "no answer within" in str(result.problem)
    assert result.seconds < 20
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_ssh_that_is_killed_is_a_host_that_went_away(play: Path) -> None:
    write(play, "kill -9 $$")
    assert "went away" in str(Ssh().run(ELSEWHERE, ["true"], timeout=20).problem)


def test_without_ssh_there_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="install the OpenSSH client"):
        run_on_all(Ssh(), [ELSEWHERE], ["true"], timeout=5)
    result = Ssh().run("localhost", ["nothing"], timeout=5)
    assert (result.code, result.problem) == (127, None)


class Crowd:
    """Counts how many hosts are asked at the same time; each waits until so many are there."""

    def __init__(self, together: int):
        self.now = self.most = 0
        self._lock = threading.Lock()
        self._together = threading.Barrier(together)

    def run(self, host: str, command: Sequence[str], *, stdin: str = "", timeout: float) -> Result:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        self._together.wait(timeout)
        with self._lock:
            self.now -= 1
        return Result(host, 0, f"{' '.join(command)} {stdin}", "", 0.0)


def test_hosts_are_asked_side_by_side_but_only_so_many_and_answer_in_order() -> None:
    crowd, hosts = Crowd(together=8), [f"node{n}" for n in range(256)]
    results = run_on_all(crowd, hosts, ["say"], stdin="so", timeout=20, at_once=8)
    assert crowd.most == 8
    assert [result.host for result in results] == hosts
    assert {result.out for result in results} == {"say so"}
    assert run_on_all(crowd, [], ["say"], timeout=20) == []
