"""What a host on this machine is made of: namespaces that a process keeps, and commands that run inside."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress

import psutil

_PROGRAMS = {"unshare": "util-linux", "ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client"}
_PROGRAMS |= {"pdsh": "pdsh"}
PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid")
START_SECONDS = 20.0


def obstacle() -> str | None:
    """Why there can be no hosts here, in one line; none: there can be."""
    if os.geteuid():
        return "two hosts on one machine need root"
    if missing := [f"{name} ({package})" for name, package in _PROGRAMS.items() if not shutil.which(name, path=PATH)]:
        return f"two hosts on one machine need {', '.join(missing)}"
    with suppress(RuntimeError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        hub = Keeper(["--net"], ["sh", "-c", "echo ready; read -r _"])
        try:
            hub.ip("link", "add", "hub", "type", "bridge")
            subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], check=True, timeout=START_SECONDS)
            return None
        finally:
            hub.end()
    return "two hosts on one machine need namespaces and a bridge, which the kernel or the container refuses"


class Command(subprocess.Popen[str]):
    """A command that runs on a host; signals are for the command itself."""

    def inner(self) -> psutil.Process | None:
        """The command: the child of what has entered the host."""
        with suppress(psutil.NoSuchProcess):
            return next(iter(psutil.Process(self.pid).children()), None)
        return None

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with suppress(psutil.NoSuchProcess):
                (self.inner() or psutil.Process(self.pid)).send_signal(sig)


class Keeper:
    """A process that keeps namespaces until it is told to end, or whoever started it has died."""

    def __init__(self, namespaces: Sequence[str], command: Sequence[str]):
        self._process = subprocess.Popen(
            ["unshare", *namespaces, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PATH": PATH},
            text=True,
        )
        assert self._process.stdout
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError(self._process.communicate()[1].strip())
        forked = "--fork" in namespaces
        self.pid = psutil.Process(self._process.pid).children()[0].pid if forked else self._process.pid

    def ip(self, *arguments: str) -> None:
        """Run `ip` in its network."""
        command = ["nsenter", f"--target={self.pid}", "--net", "ip", *arguments]
        done = subprocess.run(command, env=os.environ | {"PATH": PATH}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
