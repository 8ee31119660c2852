"""Where ranks meet is tried, not guessed: hosts that are processes here listen and connect."""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from tests.hosts_here import Here
from tidal_dist.cluster.asking import ask
from tidal_dist.cluster.network import find_network, interface_to
from tidal_dist.errors import UserError
from tidal_dist.launching import free_port

OWN = [
    (address.address, name)
    for name, all_of_it in psutil.net_if_addrs().items()
    for address in all_of_it
    if address.family == socket.AF_INET and not address.address.startswith("127.") and psutil.net_if_stats()[name].isup
]


@pytest.mark.skipif(not OWN, reason="this machine has no network but its loopback")
def test_an_address_is_chosen_that_all_others_reach() -> None:
    network = find_network(Here(), ["red", "blue", "old"])
    assert (network.address, network.interface) in OWN
    assert set(network.interfaces) == {"red", "blue", "old"}
    with socket.create_server(("", network.port)):  # free again
        pass


def test_an_address_that_leads_elsewhere_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another host has the same address, as with bridges of containers, a connection leads to itself."""
    monkeypatch.setattr("tidal_dist.cluster.network._MEET_SECONDS", 1.0)
    nowhere = "127.0.0.9"
    transport = Here(replace={"blue": {address: nowhere for address, _ in OWN}})
    with pytest.raises(UserError, match=r"^red: blue cannot connect to port \d+ of .*--master-addr$"):
        find_network(transport, ["red", "blue"], address=OWN[0][0] if OWN else "10.255.0.1")


def test_one_host_needs_no_network() -> None:
    network = find_network(Here(), ["red"])
    assert network.address == "127.0.0.1"
    assert network.interface is None


def test_what_the_user_wants_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    network = find_network(Here(), ["red", "blue"], "127.0.0.1", port)
    assert (network.address, network.port) == ("127.0.0.1", port)
    monkeypatch.setattr("tidal_dist.cluster.network._MEET_SECONDS", 0.5)
    with socket.create_server(("", port)), pytest.raises(UserError, match=f"^red: port {port} cannot be used"):
        find_network(Here(), ["red", "blue"], "127.0.0.1", port)


def test_hosts_that_do_not_answer_are_named() -> None:
    with pytest.raises(UserError, match=r"^blue: refuses connections; start sshd there$"):
        find_network(Here(gone={"blue"}), ["red", "blue"])
    other_python = Here(replace={"blue": {sys.executable: "false"}})
    with pytest.raises(UserError, match=r"^blue: .*python does not do what it does here \(exit code 1\)"):
        find_network(other_python, ["red", "blue"])


def test_the_interface_to_an_address() -> None:
    assert interface_to("127.0.0.1") is None
    for address, name in OWN:
        assert interface_to(address) == name


def test_processes_of_exactly_one_launch_are_killed_and_signalled(tmp_path_factory: pytest.TempPathFactory) -> None:
    script = tmp_path_factory.mktemp("launch") / "train.py"
    script.write_text("import os, time\nos.fork()\ntime.sleep(60)\n")
    command = [sys.executable, "-u", str(script)]
    ours, other = (subprocess.Popen(command, env=os.environ | {"TIDAL_LAUNCH_ID": name}) for name in ("one", "one-2"))
    try:
        while len(psutil.Process(ours.pid).children()) < 1:
            time.sleep(0.01)
        (fork,) = psutil.Process(ours.pid).children()
        (answer,) = ask(Here(), ["red"], ["stop", "one", script, int(signal.SIGTERM), other.pid], 10)
        assert answer.found == {"signalled": [ours.pid]}
        assert ours.wait(5) == -signal.SIGTERM
        (answer,) = ask(Here(), ["red"], ["living", ours.pid, fork.pid], 10)
        assert answer.found == {"living": [fork.pid]}
        (answer,) = ask(Here(), ["red"], ["kill", "one", 0, 5], 10)
        assert answer.found == {"killed": 1, "left": []}
        assert not psutil.pid_exists(fork.pid) or fork.status() == psutil.STATUS_ZOMBIE
        assert other.poll() is None
    finally:
        ask(Here(), ["red"], ["kill", "one-2", 0, 5], 10)
        ours.kill()
        other.wait(5)
