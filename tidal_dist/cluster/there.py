"""What is done on a host of a launch: this file's text goes there, so that it works whatever is installed there.

    python - TASK ARGUMENT... < there.py

prints one JSON object. Standard library only, psutil where it is there.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

LAUNCH_ID = "TIDAL_LAUNCH_ID"
_LOOK_SECONDS = 0.1
_AFTER_FIRST_SECONDS = 1.0


def addresses() -> dict[str, Any]:
    """The networks of this host: {"interfaces": {address: [name, Mbit/s]}, "port": one that is free}."""
    import psutil

    states = psutil.net_if_stats()
    found = {
        address.address: [name, states[name].speed]
        for name, all_of_it in psutil.net_if_addrs().items()
        for address in all_of_it
        if address.family == socket.AF_INET and states[name].isup
    }
    with socket.socket() as s:
        s.bind(("", 0))
        return {"interfaces": found, "port": s.getsockname()[1]}


def listen(port: str, token: str, others: str, seconds: str) -> dict[str, Any]:
    """Answer whoever connects with the token, until so many have said that they are done: {"heard": how many}."""
    heard, deadline = 0, time.monotonic() + float(seconds)
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", int(port)))
        except OSError as error:
            return {"heard": 0, "problem": error.strerror}
        server.listen(1024)
        while heard < int(others) and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(5.0)
                    connection.sendall(token.encode())
                    # The other side closes first, or the port would stay in use for a while.
                    heard += b"".join(iter(partial(connection.recv, 16), b"")) == b"done"
    return {"heard": heard}


def reach(port: str, token: str, seconds: str, *addresses: str) -> dict[str, Any]:
    """Which addresses lead to the listener with this token: {"reached": {address: the one of this host to it}}."""
    reached: dict[str, str] = {}
    deadline = time.monotonic() + float(seconds)
    threads = [
        threading.Thread(target=_try, args=(address, int(port), token.encode(), deadline, reached), daemon=True)
        for address in addresses
    ]
    for thread in threads:
        thread.start()
    while not reached and time.monotonic() < deadline:
        time.sleep(0.02)
    patience = time.monotonic() + _AFTER_FIRST_SECONDS
    for thread in threads:
        thread.join(max(0.0, patience - time.monotonic()))
    found = dict(reached)
    for address in list(found)[:1]:
        with suppress(OSError), socket.create_connection((address, int(port)), 5.0) as s:
            s.recv(len(token))  # what is left unread when a connection closes takes what was sent with it
            s.sendall(b"done")
    return {"reached": found}


def _try(address: str, port: int, token: bytes, deadline: float, reached: dict[str, str]) -> None:
    while (left := deadline - time.monotonic()) > 0:
        with suppress(OSError), socket.create_connection((address, port), left) as s:
            if s.recv(len(token)) == token:
                reached[address] = s.getsockname()[0]
            return
        time.sleep(0.1)


def _words(pid: int, file: str) -> list[str]:
    """The environment or the command line of a process; []: it has ended, or is another user's."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/{file}").read_bytes().decode(errors="replace").split("\0")
    return []


def _status(pid: int) -> tuple[str, int]:
    """State and parent of a process; ("", 0): it has ended."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[1])
    return "", 0


def _of_launch(launch: str) -> list[int]:
    """The processes of a launch that have not ended."""
    mark = f"{LAUNCH_ID}={launch}"
    found = (int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid())
    return [pid for pid in found if mark in _words(pid, "environ") and _status(pid)[0] not in ("", "Z", "X")]


def kill(launch: str, patience: str, seconds: str) -> dict[str, Any]:
    """Give what a launch has here `patience` seconds to end, then kill it, for `seconds` at most.

    {"killed": how many processes, "left": those that cannot be killed}.
    """
    killed, begun = set(), time.monotonic()
    while (left := _of_launch(launch)) and (passed := time.monotonic() - begun) < float(patience) + float(seconds):
        if passed >= float(patience):
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
        time.sleep(_LOOK_SECONDS)
    return {"killed": len(killed), "left": left}


def stop(launch: str, script: str, number: str, *but: str) -> dict[str, Any]:
    """Give a signal to the ranks of a launch, which run `python -u SCRIPT`, `but` not to those: {"signalled": pids}."""
    found = {pid: _status(pid)[1] for pid in _of_launch(launch) if script in _words(pid, "cmdline")[1:3]}
    # What a rank has forked looks like it, but is no rank.
    ranks = [pid for pid, parent in found.items() if parent not in found and str(pid) not in but]
    for pid in ranks:
        with suppress(OSError):
            os.kill(pid, int(number))
    return {"signalled": ranks}


def living(*pids: str) -> dict[str, Any]:
    """Which of these processes have not ended: {"living": pids}."""
    return {"living": [int(pid) for pid in pids if _status(int(pid))[0] not in ("", "Z", "X")]}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "addresses": addresses,
    "listen": listen,
    "reach": reach,
    "kill": kill,
    "stop": stop,
    "living": living,
}

if __name__ == "__main__":
    print(json.dumps(TASKS[sys.argv[1]](*sys.argv[2:])))
