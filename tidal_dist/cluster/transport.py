"""Commands on other hosts: ssh that never asks and never hangs, on many hosts at once."""

import contextlib
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

import psutil

from data_pipeline.errors import UserError
from tidal_dist import processes

AT_ONCE = 64  # ssh clients side by side: each takes some MB and a burst of cryptography
_CONNECT_SECONDS = 10
_RESOLVE_SECONDS = 3.0
_SSH_FAILED = 255


@dataclass(frozen=True)
class Result:
    """What became of a command on a host.

    Attributes:
        code: its exit code; none: it did not run to its end. seconds: that it took, the connection included.
        problem: one line, with the remedy, where the host was not reached or was lost; none: the command itself ended.
    """

    host: str
    code: int | None
    out: str
    err: str
    seconds: float
    problem: str | None = None


class Transport(Protocol):
    """A way to run commands on hosts."""

    def run(self, host: str, command: Sequence[str], *, stdin: str = "", timeout: float) -> Result:
        """Run a command to its end, `timeout` seconds at most; whatever goes wrong with the host is in the result."""


@dataclass(frozen=True)
class Ssh:
    """ssh, which answers no questions; this machine itself is reached without it.

    Attributes:
        port: of the servers; none: as ssh is configured. options: further words for ssh.
        also_to_this_machine: use ssh there too, as pdsh does.
    """

    port: int | None = None
    options: tuple[str, ...] = ()
    also_to_this_machine: bool = False

    def run(self, host: str, command: Sequence[str], *, stdin: str = "", timeout: float) -> Result:
        """Run a command to its end, `timeout` seconds at most; a remote one in the folder where logins begin.

        Raises:
            UserError: there is no ssh here.
        """
        if not self.also_to_this_machine and is_this_machine(host):
            return _run(host, list(command), stdin, timeout, is_ssh=False)
        return _run(host, [*self.words(timeout), host, shlex.join(command)], stdin, timeout, is_ssh=True)

    def words(self, timeout: float) -> list[str]:
        """ssh and its options, without the host."""
        # A host that is lost without a word is noticed after three unanswered questions.
        settings = {
            "BatchMode": "yes",
            "ConnectTimeout": max(1, min(_CONNECT_SECONDS, int(timeout))),
            "ServerAliveInterval": 5,
            "ServerAliveCountMax": 3,
        }
        options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
        port = ["-p", str(self.port)] if self.port else []
        return ["ssh", "-T", "-x", *options, *port, *self.options]


@dataclass(frozen=True)
class Srun:
    """Steps of the Slurm job that this process is part of, which need no ssh."""

    def run(self, host: str, command: Sequence[str], *, stdin: str = "", timeout: float) -> Result:
        """Run a command to its end, `timeout` seconds at most, beside the job's ranks."""
        if is_this_machine(host):
            return _run(host, list(command), stdin, timeout, is_ssh=False)
        words = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host}", *command]
        result = _run(host, words, stdin, timeout, is_ssh=False)
        said = [line for line in result.err.splitlines() if line.startswith("srun: error: ")]
        if not result.code or result.out or not said:
            return result
        problem = f"srun does not run there ({said[-1].removeprefix('srun: error: ')}); `scontrol show node {host}`"
        return replace(result, code=None, problem=problem)


def run_on_all(
    transport: Transport,
    hosts: Sequence[str],
    command: Sequence[str],
    *,
    stdin: str = "",
    timeout: float,
    at_once: int = AT_ONCE,
) -> list[Result]:
    """Run a command on each host, `at_once` at the same time at most; the results in the order of the hosts.

    Raises:
        UserError: the transport cannot be used at all.
    """
    if not hosts:
        return []
    with ThreadPoolExecutor(min(at_once, len(hosts)), thread_name_prefix="host") as pool:
        running = [pool.submit(transport.run, host, command, stdin=stdin, timeout=timeout) for host in hosts]
        try:
            return [future.result() for future in running]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def is_this_machine(host: str) -> bool:
    """Whether a host's name or address is one of this machine's."""
    name = host.rpartition("@")[2].lower()
    if name in ("localhost", socket.gethostname().lower()):
        return True
    return not _addresses(name).isdisjoint(_own_addresses())


@cache
def _addresses(name: str) -> frozenset[str]:
    """What a name resolves to, nothing where that takes long: nobody can stop a resolver, so it is left."""
    found: set[str] = set()

    def resolve() -> None:
        with contextlib.suppress(OSError, UnicodeError):
            found.update(str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(name, None))

    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(_RESOLVE_SECONDS)
    return frozenset(found)


def _own_addresses() -> set[str]:
    inet = (socket.AF_INET, socket.AF_INET6)
    own = {a.address.partition("%")[0] for many in psutil.net_if_addrs().values() for a in many if a.family in inet}
    return own | {"127.0.0.1", "127.0.1.1", "::1"}  # Debian gives the machine's own name the second


def _run(host: str, command: list[str], stdin: str, timeout: float, is_ssh: bool) -> Result:
    began = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as error:
        if is_ssh:
            raise UserError(f"ssh: cannot start ({error.strerror}); install the OpenSSH client") from None
        return Result(host, 127, "", f"{command[0]}: {error.strerror}", time.monotonic() - began)
    try:
        out, err = process.communicate(stdin, timeout)
    except subprocess.TimeoutExpired:
        out, err = _end(process)
        problem = (
            f"no answer within {timeout:.0f} s; look whether the host or one of its file systems hangs, "
            f"and try `ssh {host} true`"
        )
        return Result(host, None, out, err, time.monotonic() - began, problem)
    seconds = time.monotonic() - began
    if is_ssh and (process.returncode == _SSH_FAILED or process.returncode < 0):
        return Result(host, None, out, err, seconds, ssh_problem(host, err))
    return Result(host, process.returncode, out, err, seconds)


def _end(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """Kill a process and what it has started; what it had said."""
    for each in [*processes.below(process.pid, recursive=True), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.Error):
            each.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.communicate(timeout=1.0)  # a stranger may still hold the pipes
    return "", ""


# What ssh says, and what it means; the first that fits.
_MEANINGS = (
    (
        ("could not resolve hostname", "name or service not known", "nodename nor servname"),
        "does not resolve; correct the name in the hostfile, or add it to DNS or /etc/hosts",
    ),
    (
        ("remote host identification has changed",),
        "has another host key than known_hosts says; if it was installed anew: `ssh-keygen -R {host}`, then "
        "`ssh-keyscan -H {host} >> ~/.ssh/known_hosts`",
    ),
    (
        ("host key verification failed", "host key is known for"),
        "has a host key that is not known here; `ssh-keyscan -H {host} >> ~/.ssh/known_hosts`",
    ),
    (
        ("permission denied (", "too many authentication failures", "no more authentication methods"),
        "does not let this user in without a password ({said}); `ssh-copy-id {host}`, or load the key: `ssh-add`",
    ),
    (
        ("connection refused",),
        "refuses the connection; start its sshd, or give the port that it listens on (--ssh-port)",
    ),
    (
        ("connection timed out", "operation timed out", "no route to host", "network is unreachable"),
        "is not reached ({said}); is it up, and does a firewall let ssh through?",
    ),
    (
        ("closed by", "reset by", "broken pipe", "not responding", "kex_exchange_identification", "disconnect"),
        "went away in the middle ({said}); look at its console or `journalctl -u ssh`, then try again",
    ),
)


def ssh_problem(host: str, err: str) -> str:
    """What was wrong, from what ssh said: one line with the remedy."""
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    for signs, meaning in _MEANINGS:
        said = [line for line in lines if any(sign in line.lower() for sign in signs)]
        if said:
            return meaning.format(host=host, said=said[-1].rpartition(": ")[2].rstrip("."))
    if not lines:
        return "went away in the middle (ssh said nothing); look at its console, then try again"
    return f"ssh failed ({lines[-1].rstrip('.')}); try `ssh {host} true`"
