"""A job on the hosts of a hostfile: what is started there, and where it goes on when hosts are gone."""

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.files import replace_file
from tidal_dist.cluster import environment as env
from tidal_dist.cluster.asking import ask
from tidal_dist.cluster.attempt import Attempt, say
from tidal_dist.cluster.command import PDSH, SSH_ARGUMENTS, check_placement, launcher_arguments, tells_address
from tidal_dist.cluster.hostfile import host_of, hostfile_text
from tidal_dist.cluster.network import Network, find_network
from tidal_dist.cluster.placement import Placement, fits, share_of
from tidal_dist.cluster.ranks import RanksOfHosts
from tidal_dist.cluster.transport import Transport, is_this_machine
from tidal_dist.config import Config
from tidal_dist.launching import TRAIN, training_command
from tidal_dist.processes import LAUNCH_ID
from tidal_dist.training.interrupts import JOB_STARTED

FOLDER, HOSTFILE, ENV, OUTPUT = "launch", "hostfile", "env", "launcher.log"
_ASK_SECONDS = 8.0
_KILL_SECONDS = 3.0


@dataclass(frozen=True)
class Request:
    """What is to be started.

    Attributes:
        placement: of the ranks where all hosts are there. launcher: of `command.LAUNCHERS`. further: its arguments.
        min_hosts: fewer are not gone on with. master_addr, master_port: none: found.
        network: where ranks meet; none: found at each start.
        script: what ranks run. limit_seconds: after which a start is ended; none: never.
    """

    config_file: str
    config: Config
    overrides: list[str]
    placement: Placement
    launcher: str = PDSH
    further: tuple[str, ...] = ()
    min_hosts: int = 1
    master_addr: str | None = None
    master_port: int | None = None
    ssh_port: int | None = None
    network: Network | None = None
    script: Path = TRAIN
    limit_seconds: float | None = None

    def check(self) -> None:
        """Raises UserError where ranks do not fit lanes and batch, or the launcher cannot place them."""
        share_of(self.config, self.placement.ranks).check(self.config.data.lanes)
        check_placement(self.placement, self.launcher)
        if self.min_hosts > len(self.placement.hosts):
            raise UserError(f"--min-hosts {self.min_hosts}: there are only {len(self.placement.hosts)} hosts")


@dataclass(frozen=True)
class Start:
    """One start, as it is to be made.

    Attributes:
        environment: of the ranks. kept: lines of the user's own files for the launcher. command: as it is run.
    """

    placement: Placement
    network: Network
    environment: dict[str, str]
    kept: dict[str, str]
    command: list[str]


class Job:
    """Starts a request again and again. variables: of this process."""

    def __init__(self, request: Request, transport: Transport, variables: Mapping[str, str] = os.environ):
        self.request, self._transport, self._variables = request, transport, variables
        self._folder = Path(request.config.run_dir) / FOLDER
        self._launch = f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(4)}"
        self._began = variables.get(JOB_STARTED, str(time.time()))
        self._placement: Placement | None = None

    def plan(self, placement: Placement, network: Network, resume: bool) -> Start:
        """What a start on these hosts is."""
        request = self.request
        environment = env.environment_for(request.config, network.interface, self._variables)
        environment |= {LAUNCH_ID: self._launch, JOB_STARTED: self._began}
        if not tells_address(request.launcher):
            environment |= {"MASTER_ADDR": network.address, "MASTER_PORT": str(network.port)}
        kept = env.kept_lines(self._variables)
        arguments = launcher_arguments(
            Placement(placement.hosts, self._folder / HOSTFILE),
            request.launcher,
            network,
            sorted(environment),
            _is_local(placement, request.launcher),
            request.ssh_port,
            request.further,
        )
        words = [*_resumed(resume), *request.overrides]
        command = training_command(request.config_file, words, arguments, request.script)
        return Start(placement, network, environment, kept, command)

    def start(self, resume: bool) -> Attempt:
        """The next attempt, on the hosts that are there.

        Raises:
            UserError: at the first start a host does not answer; later too few do, or they do not reach each other.
        """
        request = self.request
        placement = self._first() if self._placement is None else self._next()
        network = request.network or find_network(
            self._transport, list(placement.hosts), request.master_addr, request.master_port
        )
        start = self.plan(placement, network, resume)
        self._write(start)
        self._tell(start)
        self._placement = placement
        output = self._folder / OUTPUT
        ranks = RanksOfHosts(self._transport, self._launch, placement, self._folder.parent, output, request.script)
        file = open(output, "ab")  # noqa: SIM115 (the attempt's)
        return Attempt(start.command, ranks, self._of_launcher(start), file, request.limit_seconds)

    def _first(self) -> Placement:
        self.request.check()
        return self.request.placement

    def _next(self) -> Placement:
        """Ranks on the hosts that answer; nothing of earlier starts is left there."""
        request = self.request
        hosts = list(request.placement.hosts)
        answers = ask(self._transport, hosts, ["kill", self._launch, 0, _KILL_SECONDS], _ASK_SECONDS)
        gone = [answer for answer in answers if answer.problem]
        for answer in gone:
            say(f"left out: {answer.problem}")
        there = request.placement.on([answer.host for answer in answers if not answer.problem])
        found = there.most(partial(fits, request.config))
        if found is None or len(found.hosts) < request.min_hosts:
            least = f"--min-hosts {request.min_hosts}" if found else f"data.lanes={request.config.data.lanes}"
            raise UserError(f"{len(there.hosts)} of {len(hosts)} hosts answer, too few for {least}")
        if found.hosts != (self._placement or found).hosts:
            say(f"going on with {len(found.hosts)} of {len(hosts)} hosts")
        return found

    def _write(self, start: Start) -> None:
        """The files that the launcher reads."""
        hosts = [host_of(name, numbers) for name, numbers in self._all_slots(start.placement).items()]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(self._folder / HOSTFILE, hostfile_text(hosts).encode())
            (self._folder / OUTPUT).touch()
        except OSError as error:
            raise UserError(f"{self._folder}: cannot write ({error.strerror}); choose another run_dir") from None
        if self.request.launcher == PDSH:
            env.write_env_file(self._folder / ENV, start.environment, start.kept)

    def _all_slots(self, placement: Placement) -> dict[str, tuple[int, ...]]:
        """With pdsh a host's slots up to the last one that is chosen, among which the launcher then chooses."""
        return {name: tuple(range(max(numbers) + 1)) for name, numbers in placement.hosts.items()}

    def _of_launcher(self, start: Start) -> dict[str, str]:
        """What the launcher itself has in its environment."""
        own = start.environment | {"PDSH_SSH_ARGS_APPEND": self._ssh_arguments()}
        if self.request.launcher == PDSH:
            own |= {env.ENV_FILE: str((self._folder / ENV).absolute())}
        return own

    def _ssh_arguments(self) -> str:
        return " ".join(filter(None, [SSH_ARGUMENTS, self._variables.get("PDSH_SSH_ARGS_APPEND")]))

    def _tell(self, start: Start) -> None:
        network, placement = start.network, start.placement
        by = f" by {network.interface}" if network.interface else ""
        if not by and network.interfaces:
            by = ", each by its own interface (" + ", ".join(f"{h} {i}" for h, i in network.interfaces.items()) + ")"
        say(f"ranks: {placement.ranks}, on {', '.join(placement.hosts)}")
        say(f"they meet at {network.address}, port {network.port}{by}: {network.reason}")
        for line in env.differences(start.environment, start.kept):
            say(line)
        if names := env.withheld(self.request.config, self._variables):
            say(f"not handed on, since command lines are seen by everybody: {', '.join(names)}; set them on each host")


def _resumed(resume: bool) -> Sequence[str]:
    return ["--resume"] if resume else []


def _is_local(placement: Placement, launcher: str) -> bool:
    """Whether nothing lies between the launcher and the ranks: the only host is this machine."""
    return launcher == PDSH and len(placement.hosts) == 1 and is_this_machine(next(iter(placement.hosts)))
