"""Hosts on one machine: a name, a network, processes, a home and an sshd each; files are those of this machine.

Every host is a set of namespaces that a shell keeps, the first process of its host. The shell reads from a pipe of this
process: when that closes, whatever this process dies of, the shell ends, the kernel kills all processes of the host and
removes its network. So no name, interface or process of a host is ever seen outside, and none is left behind.
"""

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.hosts.namespaces import NAMESPACES, PATH, START_SECONDS, Command, Keeper
from tests.launching import ROOT, environment

INTERFACE = "eth0"
_NETWORK = "10.77.0"

# Arguments: the name of the host, and the folder with what it has of its own.
_HOST = """
set -e
hostname "$1"
mount -t tmpfs tmpfs /run && mkdir /run/sshd
mount -t tmpfs tmpfs /dev/shm
for file in passwd shadow hosts nsswitch.conf; do
    [ ! -e "/etc/$file" ] || mount --bind "$2/etc/$file" "/etc/$file"
done
ip link set lo up
echo ready
read -r || exit 0
"""

_SSHD = """
HostKey {folder}/host_key
PidFile {folder}/sshd.pid
UsePAM no
PermitRootLogin yes
PasswordAuthentication yes
MaxStartups 200
MaxSessions 200
SetEnv OMP_NUM_THREADS=1
"""


@dataclass
class _Host:
    name: str
    address: str
    folder: Path
    keeper: Keeper

    @property
    def home(self) -> Path:
        return self.folder / "home"


@dataclass
class Cluster:
    """Hosts that reach each other by name and by ssh with a key, as the user that runs this.

    Attributes:
        folder: of whatever belongs to the hosts.
    """

    folder: Path
    _hub: Keeper = field(init=False)
    _hosts: dict[str, _Host] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        (self.folder / "etc").mkdir(parents=True)
        _make_key(self.folder / "user_key")
        self._hub = Keeper(["--net"], ["sh", "-c", "echo ready; read -r _"])
        self._hub.ip("link", "add", "hub", "type", "bridge")
        self._hub.ip("link", "set", "hub", "up")

    @property
    def hosts(self) -> list[str]:
        """Their names."""
        return list(self._hosts)

    def address(self, host: str) -> str:
        """Of its interface, `eth0`."""
        return self._hosts[host].address

    def home(self, host: str) -> Path:
        """The home folder of the user there, with `.ssh`."""
        return self._hosts[host].home

    def name_as_debian_does(self) -> None:
        """Have each host's own name lead to an address of its loopback, until the next `reset` or `add`."""
        for name, host in self._hosts.items():
            path = host.folder / "etc" / "hosts"
            path.write_text(f"127.0.1.1 {name}\n{path.read_text()}")

    def add(self, name: str) -> None:
        """Another host, that the others know and reach."""
        taken = {host.address for host in self._hosts.values()}
        address = next(a for number in range(1, 255) if (a := f"{_NETWORK}.{number}") not in taken)
        folder = self.folder / name
        _write_host(folder)
        namespaces = [*NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
        keeper = Keeper(namespaces, ["bash", "-c", _HOST, "host", name, str(folder)])
        self._hosts[name] = _Host(name, address, folder, keeper)
        self._hub.ip("link", "add", f"to-{name}", "type", "veth", "peer", "name", INTERFACE, "netns", str(keeper.pid))
        self._hub.ip("link", "set", f"to-{name}", "master", "hub")
        # The same for every host that has this address, so that the others need not learn it anew.
        keeper.ip("link", "set", INTERFACE, "address", f"02:00:00:00:00:{int(address.rpartition('.')[2]):02x}")
        keeper.ip("addr", "add", f"{address}/24", "dev", INTERFACE)
        keeper.ip("link", "set", INTERFACE, "up")
        self.mend(name)
        self._introduce()
        self.start_sshd(name)

    def remove(self, name: str) -> None:
        """End a host, and forget it."""
        self._hosts[name].keeper.end()
        shutil.rmtree(self._hosts.pop(name).folder)
        self._introduce()

    def _introduce(self) -> None:
        """Tell each host the names, addresses and keys of all."""
        names = ["127.0.0.1 localhost", *(f"{h.address} {h.name}" for h in self._hosts.values())]
        keys = [
            f"{h.name},{h.address} {' '.join((h.folder / 'host_key.pub').read_text().split()[:2])}"
            for h in self._hosts.values()
        ]
        for host in self._hosts.values():
            # Written in place, since the host has mounted this very file.
            (host.folder / "etc" / "hosts").write_text("\n".join(names) + "\n")
            ssh = host.home / ".ssh"
            own = (host.folder / "host_key.pub").read_text()
            (ssh / "known_hosts").write_text("\n".join([*keys, f"localhost,127.0.0.1 {own}"]) + "\n")
            shutil.copy(self.folder / "user_key.pub", ssh / "authorized_keys")
            shutil.copy(self.folder / "user_key", ssh / "id_ed25519")

    def hostfile(self, slots: int = 1, hosts: Iterable[str] | None = None) -> Path:
        """A hostfile with these hosts, or all."""
        path = self.folder / "hostfile"
        path.write_text("".join(f"{host} slots={slots}\n" for host in hosts or self.hosts))
        return path

    def popen(self, host: str, command: Sequence[str | Path], **options: Any) -> Command:
        """Start a command on a host, in the repository unless `cwd` says otherwise.

        Args:
            options: of subprocess.Popen; `env`: beside what the host has.
        """
        at = self._hosts[host]
        folder = str(options.pop("cwd", ROOT))
        enter = ["nsenter", f"--target={at.keeper.pid}", *NAMESPACES, f"--wd={folder}", "--"]
        own: Mapping[str, str] = options.pop("env", {})
        env = environment() | {"HOME": str(at.home), "PATH": PATH, **own}
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return Command([*enter, *map(str, command)], env=env, text=True, start_new_session=True, **options)

    def run(
        self, host: str, command: Sequence[str | Path], timeout: float = 240, input: str | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end; see `popen`.

        Raises:
            subprocess.TimeoutExpired: it has been killed.
        """
        if input is not None:
            options["stdin"] = subprocess.PIPE
        with self.popen(host, command, **options) as process:
            try:
                out, err = process.communicate(input, timeout)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def start_sshd(self, host: str) -> None:
        """Have the host listen."""
        folder = self._hosts[host].folder
        sshd = shutil.which("sshd", path=PATH)
        done = self.run(host, [str(sshd), "-f", folder / "sshd_config", "-E", folder / "sshd.log"])
        assert done.returncode == 0, done.stderr
        deadline = time.monotonic() + START_SECONDS
        while not self._sshd(host) and time.monotonic() < deadline:
            time.sleep(0.01)

    def stop_sshd(self, host: str) -> None:
        """Have the host refuse new connections."""
        if number := self._sshd(host):
            self.run(host, ["bash", "-c", f"kill {number}; while kill -0 {number}; do sleep 0.02; done"])

    def _sshd(self, host: str) -> int | None:
        """The listening sshd, as the host numbers its processes."""
        path = self._hosts[host].folder / "sshd.pid"
        return int(path.read_text()) if path.exists() and path.read_text().strip() else None

    def cut(self, host: str) -> None:
        """Pull the host's cable."""
        self._hub.ip("link", "set", f"to-{host}", "down")

    def mend(self, host: str) -> None:
        """Plug it in again."""
        self._hub.ip("link", "set", f"to-{host}", "up")

    def processes(self, host: str) -> list[psutil.Process]:
        """What runs on a host, with the numbers that this process sees, beside sshd and what keeps the host."""
        return [p for p in self._everything(host) if _is_living(p)]

    def _everything(self, host: str) -> list[psutil.Process]:
        keeper = self._hosts[host].keeper.pid
        here = os.readlink(f"/proc/{keeper}/ns/pid")
        return [p for p in psutil.process_iter() if p.pid != keeper and _namespace(p) == here]

    def reset(self) -> None:
        """As it was at the start, for the next test: two hosts, connected, and nothing running on them."""
        for host in self.hosts:
            everything = self._everything(host)
            for process in everything:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            psutil.wait_procs(everything, timeout=START_SECONDS)
            (self._hosts[host].folder / "sshd.pid").unlink(missing_ok=True)
        for host in self.hosts[2:]:
            self.remove(host)
        self._introduce()
        for host in self.hosts:
            self.mend(host)
            self.start_sshd(host)

    def end(self) -> None:
        """Nothing of it is left, but files."""
        for host in self._hosts.values():
            host.keeper.end()
        self._hub.end()


def _write_host(folder: Path) -> None:
    """What a host has of its own: keys, sshd's configuration, a home, and files of /etc that say where that is."""
    for part in ("etc", "home"):
        (folder / part).mkdir(parents=True)
    (folder / "home" / ".ssh").mkdir(mode=0o700)
    _make_key(folder / "host_key")
    (folder / "sshd_config").write_text(_SSHD.format(folder=folder))
    user = pwd.getpwuid(os.geteuid())
    own = [user.pw_name, "x", str(user.pw_uid), str(user.pw_gid), "", str(folder / "home"), "/bin/bash"]
    others = [line for line in Path("/etc/passwd").read_text().splitlines() if line.split(":")[2:3] != own[2:3]]
    files = {"passwd": "\n".join([":".join(own), *others]), "shadow": f"{user.pw_name}:*:19000:0:99999:7:::"}
    files |= {"hosts": "", "nsswitch.conf": "passwd: files\nshadow: files\ngroup: files\nhosts: files"}
    for name, text in files.items():
        (folder / "etc" / name).write_text(text + "\n")


def _make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)], check=True)


def _namespace(process: psutil.Process) -> str | None:
    with suppress(OSError):
        return os.readlink(f"/proc/{process.pid}/ns/pid")
    return None


def _is_living(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE and process.name() != "sshd"
    return False


@contextmanager
def two_hosts(folder: Path) -> Iterator[Cluster]:
    """`alpha` and `beta`, until the end of the block; `obstacle` tells whether there can be any."""
    cluster = Cluster(folder)
    try:
        for name in ("alpha", "beta"):
            cluster.add(name)
        yield cluster
    finally:
        cluster.end()
