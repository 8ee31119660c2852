"""`tidal preflight`: asks every host, then has all of them do something together; go or no-go."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tidal_dist.cluster import environment as env
from tidal_dist.cluster.hostfile import Host, host_of
from tidal_dist.cluster.job import Request
from tidal_dist.cluster.network import Network, find_network
from tidal_dist.cluster.preflight import machines, memory, software
from tidal_dist.cluster.preflight.asking import Asked, look, reach
from tidal_dist.cluster.preflight.rows import EVERYWHERE, Row
from tidal_dist.cluster.preflight.trial import attempt
from tidal_dist.cluster.transport import AT_ONCE, Transport
from tidal_dist.errors import UserError
from tidal_dist.launching import TRAIN
from tidal_dist.plan import Plan

ENV_FILE = Path(env.ENV_FILE_NAME)
_HANDED_ON = ("PYTHON", "NCCL", "UCX", "MV2", "MLFLOW")
# Packages that ranks import, besides those that they import in turn.
PACKAGES = (
    *("torch", "deepspeed", "numpy", "pydantic", "psutil", "safetensors", "tokenizers", "triton", "webdataset"),
    *("pyyaml", "regex", "tensorboard", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "flash-attn", "s3fs"),
)


@dataclass
class Report:
    """What was found.

    Attributes:
        measured: by the ranks together; none: they were not started. written: files that `--fix` wrote.
    """

    hosts: list[str]
    rows: list[Row] = field(default_factory=list)
    measured: dict[str, Any] | None = None
    written: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def go(self) -> bool:
        """Whether nothing stands in the way."""
        return not self.failed

    @property
    def failed(self) -> list[Row]:
        """What stands in the way."""
        return [row for row in self.rows if row.status == "fail"]


def preflight(
    request: Request,
    transport: Transport,
    *,
    sample: int,
    together: bool = True,
    fix: bool = False,
    at_once: int = AT_ONCE,
    progress: Callable[[str], object] = lambda _: None,
) -> Report:
    """Look at every host of a request, `at_once` at the same time at most.

    Args:
        sample: member groups of shards that each host compares with their hashes. together: start ranks too.
        fix: write the launcher's environment file where variables are missing.

    Raises:
        UserError: hosts cannot be asked at all.
    """
    began = time.monotonic()
    hosts = [host_of(name, numbers) for name, numbers in request.placement.hosts.items()]
    report, names = Report([host.name for host in hosts]), [host.name for host in hosts]
    progress(f"{len(hosts)} hosts: are they there?")
    asked = reach(transport, names, at_once)
    report.rows += software.launcher_rows(request.launcher, len(hosts))
    environment = env.environment_for(request.config)
    if asked.pythons:
        progress(f"{len(asked.pythons)} hosts: what is there?")
        place = str(Path.cwd()), environment
        look(transport, list(asked.pythons), _question(request, sample), place, asked, at_once)
    report.rows += [*asked.rows, *_rows(request, hosts, asked)]
    report.rows.append(_env_file(environment, report, fix))
    if report.go:
        progress("do they reach each other?")
        network, row = _network(transport, names, request, at_once)
        report.rows.append(row)
        if network and together:
            progress("all together: exchanges and a checkpoint")
            report.measured, rows = attempt(replace(request, network=network), transport)
            report.rows += rows
    else:
        text = "not tried, since there are failures above"
        report.rows.append(Row(EVERYWHERE, "collective", "warn", text, "mend them, then run this again"))
    report.seconds = time.monotonic() - began
    return report


def _question(request: Request, sample: int) -> dict[str, Any]:
    """What `node.look` is asked."""
    variables, secrets = env.patterns_to_compare()
    data = request.config.data
    words = [str(sample), request.config_file, *request.overrides]
    return {
        "script": str(TRAIN),
        "packages": PACKAGES,
        "variables": variables,
        "secrets": secrets,
        "run_dir": request.config.run_dir,
        "folders": {"shard cache": data.cache} if data.cache else {},
        "reads": lambda number: ["-m", "tidal_dist.cluster.preflight.reads", str(number), *words],
    }


def _rows(request: Request, hosts: list[Host], asked: Asked) -> Iterator[Row]:
    """Of what hosts said, one after the other."""
    if asked.pythons:
        yield from software.python_rows(asked.pythons, sys.executable)
        yield from machines.clock_rows(asked.clocks)
    facts = asked.facts
    if not facts:
        return
    yield from software.project_rows(facts, str(Path.cwd()))
    yield from software.package_rows(facts)
    yield from software.torch_rows(facts)
    yield from software.config_rows(facts, request.config_file)
    yield from software.environment_rows(facts)
    yield from machines.gpu_rows(facts, {host.name: host.slots for host in hosts})
    made = _planned(request, hosts, facts)
    if isinstance(made, Plan):
        yield from memory.memory_rows(made, hosts, facts)
    else:
        yield made
    size = memory.checkpoint_bytes(made) if isinstance(made, Plan) else 0.0
    # The newest ones, the two best ones, and the one that is being written.
    yield from machines.disk_rows(facts, size, request.config.training.keep_checkpoints + 3)
    yield from machines.run_folder_rows(facts, asked.seen)
    yield from machines.shard_rows(facts)


def _planned(request: Request, hosts: list[Host], facts: Mapping[str, Mapping[str, Any]]) -> Plan | Row:
    try:
        return memory.planned(request.config, hosts, facts)
    except UserError as error:
        return memory.layout_row(error)


def _env_file(environment: Mapping[str, str], report: Report, fix: bool) -> Row:
    """Whether the launcher alone would hand on what ranks need; writes its file if it is to."""
    try:
        kept = env.kept_lines()
        # Those that begin so the launcher hands on by itself.
        lacking = [name for name in environment if name not in kept and not name.startswith(_HANDED_ON)]
        if lacking and fix:
            env.write_env_file(ENV_FILE, environment, kept)
            report.written.append(str(ENV_FILE.absolute()))
            lacking = []
        return software.env_file_row(EVERYWHERE, lacking, env.differences(environment, kept))
    except UserError as error:
        return Row(EVERYWHERE, "env file", "fail", str(error), "mend or remove it")


def _network(transport: Transport, names: list[str], request: Request, at_once: int) -> tuple[Network | None, Row]:
    """Where ranks would meet. Hosts come in groups, since those of a group must be there at the same time."""
    address, port, network = request.master_addr, request.master_port, None
    first, others, most = names[0], names[1:], max(at_once - 1, 1)
    try:
        for start in range(0, max(len(others), 1), most):
            network = find_network(transport, [first, *others[start : start + most]], address, port)
            address, port = network.address, network.port
    except UserError as error:
        what, _, remedy = str(error).removeprefix(f"{first}: ").partition("; ")
        return None, Row(first, "network", "fail", what, remedy)
    assert network
    by = f" by {network.interface}" if network.interface else ""
    return network, Row(EVERYWHERE, "network", "ok", f"all reach {network.address} port {network.port}{by}")
