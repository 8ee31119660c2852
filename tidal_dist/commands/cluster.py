"""The commands of many hosts. Heavy imports happen inside."""

import argparse
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidal_dist.cluster.command import LAUNCHERS, PDSH, SLURM
from tidal_dist.commands.output import check_range, log, print_report

if TYPE_CHECKING:
    from tidal_dist.cluster.job import Request, Start
    from tidal_dist.cluster.transport import Transport


def _add_hosts(sub: argparse.ArgumentParser) -> None:
    """Arguments that say on which hosts ranks are started, and how."""
    sub.add_argument("--hostfile", type=Path, required=True, metavar="FILE", help="`host slots=8` a line")
    sub.add_argument("--include", default="", metavar="HOST:0,1@HOST", help="only these slots of the hostfile")
    sub.add_argument("--exclude", default="", metavar="HOST:0,1@HOST", help="all but these slots of the hostfile")
    sub.add_argument("--launcher", choices=LAUNCHERS, default="pdsh", help="below deepspeed's (default: %(default)s)")
    sub.add_argument("--launcher-args", default="", metavar="'...'", help="further arguments of that launcher")
    sub.add_argument("--ssh-port", type=int, metavar="PORT", help="of the hosts' sshd")
    sub.add_argument("--master-addr", metavar="ADDRESS", help="where ranks meet (default: one that all hosts reach)")
    sub.add_argument("--master-port", type=int, metavar="PORT", help="(default: one that is free)")


def add_preflight(sub: argparse.ArgumentParser) -> None:
    """Arguments of `tidal preflight`, beside the configuration."""
    _add_hosts(sub)
    sub.add_argument(
        "--sample",
        type=int,
        default=8,
        metavar="N",
        help="pieces of shards that each host checks (default: %(default)s)",
    )
    sub.add_argument("--no-collective", action="store_true", help="start no ranks")
    sub.add_argument(
        "--fix", action="store_true", help="write .deepspeed_env where variables are missing; else nothing"
    )


def preflight(arguments: argparse.Namespace) -> int:
    """`tidal preflight`; 1 for no-go."""
    from tidal_dist.cluster.preflight.report import as_object, as_text
    from tidal_dist.cluster.preflight.run import preflight as look_and_try

    check_range("--sample", arguments.sample, 0, 10_000)
    request = _request(arguments)
    # pdsh goes by ssh to this machine too.
    by_ssh = arguments.launcher == PDSH and len(request.placement.hosts) > 1
    report = look_and_try(
        request,
        _transport(arguments, by_ssh),
        sample=arguments.sample,
        together=not arguments.no_collective,
        fix=arguments.fix,
        progress=_timed(),
    )
    print_report(arguments, as_object(report), as_text(report))
    return 0 if report.go else 1


def _timed() -> Callable[[str], None]:
    """Writes lines of progress, with the seconds since now."""
    began = time.monotonic()
    return lambda text: log(f"{time.monotonic() - began:5.1f} s  {text}")


def add_launch(sub: argparse.ArgumentParser) -> None:
    """Arguments of `tidal launch`, beside the configuration."""
    _add_hosts(sub)
    sub.add_argument(
        "--max-restarts", type=int, default=10, metavar="N", help="without a new checkpoint (default: %(default)s)"
    )
    sub.add_argument(
        "--pause", type=float, default=5.0, metavar="SECONDS", help="before the first restart; doubles (default: 5)"
    )
    sub.add_argument(
        "--min-hosts",
        type=int,
        default=1,
        metavar="N",
        help="a restart leaves out hosts that do not answer, but not below so many (default: %(default)s)",
    )
    sub.add_argument(
        "--requeue",
        action="store_true",
        help="end with 3 where the run was stopped before its end, so that what started this starts it again",
    )
    sub.add_argument("--dry-run", action="store_true", help="show environment and command, ask no host, do nothing")


def launch(arguments: argparse.Namespace) -> int:
    """`tidal launch`; 0 when the run is finished or was stopped on request; in the second case 3 with `--requeue`."""
    from tidal_dist.cluster.attempt import stop_signals_wait
    from tidal_dist.cluster.job import Job
    from tidal_dist.cluster.network import Network
    from tidal_dist.cluster.supervisor import UNFINISHED, is_finished, supervise

    check_range("--max-restarts", arguments.max_restarts, 0, float("inf"))
    check_range("--min-hosts", arguments.min_hosts, 1, float("inf"))
    request = _request(arguments, arguments.min_hosts)
    request.check()
    job = Job(request, _transport(arguments))
    if arguments.dry_run:
        first = next(iter(request.placement.hosts))
        network = Network(request.master_addr or first, request.master_port or 29500, {}, "")
        return print_report(arguments, *_shown(job.plan(request.placement, network, False)))
    with stop_signals_wait():
        code = supervise(request.config, job.start, arguments.max_restarts, arguments.pause)
        return UNFINISHED if arguments.requeue and code == 0 and not is_finished(request.config) else code


def _transport(arguments: argparse.Namespace, also_to_this_machine: bool = False) -> "Transport":
    """The way to the hosts: ssh, or within a Slurm job that starts the ranks too, its own steps.

    Args:
        also_to_this_machine: by ssh.
    """
    from tidal_dist.cluster.transport import Srun, Ssh

    if arguments.launcher == SLURM and "SLURM_JOB_ID" in os.environ:
        return Srun()
    return Ssh(port=arguments.ssh_port, also_to_this_machine=also_to_this_machine)


def _request(arguments: argparse.Namespace, min_hosts: int = 1) -> "Request":
    """What is to be started.

    Raises:
        UserError: configuration or hostfile are wrong.
    """
    from tidal_dist.cluster.job import Request
    from tidal_dist.cluster.placement import on_hosts
    from tidal_dist.config import load_config

    return Request(
        config_file=arguments.config,
        config=load_config(arguments.config, arguments.overrides),
        overrides=arguments.overrides,
        placement=on_hosts(arguments.hostfile, arguments.include, arguments.exclude, ()),
        launcher=arguments.launcher,
        further=tuple(shlex.split(arguments.launcher_args)),
        min_hosts=min_hosts,
        master_addr=arguments.master_addr,
        master_port=arguments.master_port,
        ssh_port=arguments.ssh_port,
    )


def _shown(start: "Start") -> tuple[dict[str, Any], str]:
    """What a start would be, as an object and as text."""
    from tidal_dist.cluster.environment import differences, reason_for

    variables = [(n, v, reason_for(n)) for n, v in sorted({**start.environment, **start.kept}.items())]
    told = differences(start.environment, start.kept)
    report = {
        "ranks": start.placement.ranks,
        "hosts": start.placement.hosts,
        "environment": [{"name": name, "value": value, "reason": reason} for name, value, reason in variables],
        "differences": told,
        "command": start.command,
    }
    hosts = ", ".join(f"{host} ({len(slots)})" for host, slots in start.placement.hosts.items())
    lines = [
        f"{start.placement.ranks} ranks: {hosts}",
        "the address, the port and the interface that are not given are found when it starts",
        "environment of every rank:",
        *(f"  {name}={value}\n      {reason}" for name, value, reason in variables),
        *(f"  {line}" for line in told),
        "command:",
        f"  {shlex.join(start.command)}",
    ]
    return report, "\n".join(lines)
