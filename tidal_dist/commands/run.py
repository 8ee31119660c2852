"""The commands of runs: rehearsed, watched, diagnosed. Heavy imports happen inside."""

import argparse
import secrets
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import UserError
from tidal_dist.commands.output import check_range, log, print_report

if TYPE_CHECKING:
    from tidal_dist.cluster.placement import Placement
    from tidal_dist.config import Config


def add_drill(sub: argparse.ArgumentParser) -> None:
    """Arguments of `tidal drill`, beside the configuration."""
    sub.add_argument(
        "--ranks", type=int, metavar="N", help="as many as the job will have (default: all slots, or GPUs, or 2)"
    )
    sub.add_argument(
        "--other-ranks", type=int, metavar="M", help="of the second resume (default: the most below N that fit)"
    )
    sub.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="the job's hosts, `host slots=8` a line; run this on one"
    )
    sub.add_argument("--include", default="", metavar="HOST:0,1@HOST", help="only these slots of the hostfile")
    sub.add_argument("--exclude", default="", metavar="HOST:0,1@HOST", help="all but these slots of the hostfile")
    sub.add_argument("--launcher", default="", metavar="'...'", help="further arguments of the deepspeed launcher")
    sub.add_argument("--steps", type=int, default=12, metavar="S", help="steps of a run (default: %(default)s)")
    sub.add_argument("--seed", type=int, help="of what is killed and when (default: another one each time)")
    sub.add_argument("--timeout-minutes", type=float, default=30.0, help="for a launch (default: %(default)g)")
    sub.add_argument("--keep", action="store_true", help="leave the rehearsal's folder, beside run_dir, there")


def drill(arguments: argparse.Namespace) -> int:
    """`tidal drill`; 1 for no-go."""
    from tidal_dist.config import load_config
    from tidal_dist.drill.rehearsal import LEAST_STEPS, Plan, rehearse

    check_range("--steps", arguments.steps, LEAST_STEPS, float("inf"))
    check_range("--timeout-minutes", arguments.timeout_minutes, 0.01, float("inf"))
    config = load_config(arguments.config, arguments.overrides)
    placement = _placement(arguments)
    seed = secrets.randbelow(2**31) if arguments.seed is None else arguments.seed
    plan = Plan(
        config_file=arguments.config,
        overrides=arguments.overrides,
        config=config,
        placement=placement,
        other=_other(arguments, config, placement),
        steps=arguments.steps,
        seed=seed,
        keep=arguments.keep,
        timeout_minutes=arguments.timeout_minutes,
    )
    report = rehearse(plan, log)
    print_report(arguments, report.as_object(), report.as_text())
    return 0 if report.go else 1


def _placement(arguments: argparse.Namespace) -> "Placement":
    from tidal_dist.cluster.placement import on_hosts, on_this_machine

    further = tuple(shlex.split(arguments.launcher))
    if arguments.ranks is not None:
        check_range("--ranks", arguments.ranks, 1, float("inf"))
    if arguments.hostfile is None:
        if arguments.include or arguments.exclude:
            raise UserError("--include and --exclude choose among the slots of --hostfile; give it, or --ranks alone")
        return on_this_machine(arguments.ranks or _gpus() or 2, further)
    placement = on_hosts(arguments.hostfile, arguments.include, arguments.exclude, further)
    if arguments.ranks is None:
        return placement
    return _placed(placement, arguments.ranks, "--ranks")


def _placed(placement: "Placement", ranks: int, argument: str) -> "Placement":
    found = placement.with_ranks(ranks)
    if found is None:
        raise UserError(
            f"{argument} {ranks}: cannot be spread evenly over {placement.ranks} slots of {len(placement.hosts)} hosts"
        )
    return found


def _other(arguments: argparse.Namespace, config: "Config", placement: "Placement") -> "Placement | None":
    from tidal_dist.cluster.placement import fits, on_hosts, on_this_machine, share_of

    if arguments.other_ranks is None:
        # A single rank has fewer nowhere; on CPUs it may have more.
        if placement.ranks == 1 and placement.hostfile is None and _gpus() != 1 and fits(config, 2):
            return on_this_machine(2, placement.further)
        return placement.another(partial(fits, config))
    check_range("--other-ranks", arguments.other_ranks, 1, float("inf"))
    share_of(config, arguments.other_ranks).check(config.data.lanes)
    if placement.hostfile is None:
        return on_this_machine(arguments.other_ranks, placement.further)
    everything = on_hosts(arguments.hostfile, arguments.include, arguments.exclude, placement.further)
    return _placed(everything, arguments.other_ranks, "--other-ranks")


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def add_diagnose(sub: argparse.ArgumentParser) -> None:
    """Arguments of `tidal diagnose`."""
    sub.add_argument("run", type=Path, metavar="RUN", help="run folder")
    sub.add_argument(
        "--patience", type=float, default=60.0, metavar="SECONDS", help="without progress it hangs (default: 60)"
    )
    sub.add_argument(
        "--slower", type=float, default=1.3, metavar="X", help="a rank is slow at X times the rest (default: 1.3)"
    )


def diagnose(arguments: argparse.Namespace) -> int:
    """`tidal diagnose`; 1 if something is wrong."""
    from tidal_dist.diagnose import report, verdict

    check_range("--patience", arguments.patience, 1, float("inf"))
    check_range("--slower", arguments.slower, 1, float("inf"))
    found = verdict.diagnose(arguments.run, arguments.patience, arguments.slower)
    print_report(arguments, report.as_object(arguments.run, found), report.as_text(arguments.run, found))
    return 0 if found.is_well else 1


def add_report(sub: argparse.ArgumentParser) -> None:
    """Arguments of `tidal report`."""
    sub.add_argument("run", type=Path, metavar="RUN", help="run folder")
    sub.add_argument("--html", type=Path, metavar="FILE", help="where to write the page (default: RUN/report.html)")


def report(arguments: argparse.Namespace) -> int:
    """`tidal report`."""
    from tidal_dist.inspection.report import without_nan
    from tidal_dist.run_report.headline import as_text
    from tidal_dist.run_report.page import REPORT, write_report

    path = arguments.html or arguments.run / REPORT
    facts = write_report(arguments.run, path)
    log(f"wrote {path}")
    return print_report(arguments, without_nan(facts.as_object()), as_text(facts))


def add_plan(sub: argparse.ArgumentParser) -> None:
    """Arguments of `tidal plan`."""
    sub.add_argument("config", help="YAML file of the run")
    sub.add_argument("--nodes", type=int, required=True, metavar="N", help="machines")
    sub.add_argument("--gpus-per-node", type=int, required=True, metavar="G", help="GPUs of each machine")
    sub.add_argument("--gpu", required=True, metavar="NAME", help="h100, a100, h200, b200 ...; a wrong name lists all")
    sub.add_argument("--gpu-hour-price", type=float, metavar="PRICE", help="for the cost, in any currency")
    sub.add_argument("--matmul-share", type=float, metavar="SHARE", help="of the peak that matrix products reach")
    sub.add_argument("--attention-share", type=float, metavar="SHARE", help="of the peak that attention reaches")
    sub.add_argument("--network-gb-per-second", type=float, metavar="RATE", help="of a node, for each of its GPUs")
    sub.add_argument("--overlap", type=float, metavar="SHARE", help="of the computing that communication hides behind")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the configuration")


def plan(arguments: argparse.Namespace) -> int:
    """`tidal plan`."""
    from dataclasses import replace

    from tidal_dist.config import load_config
    from tidal_dist.gpus import gpu_named
    from tidal_dist.plan import plan as make
    from tidal_dist.planning.changes import changes
    from tidal_dist.planning.cluster import Assumptions, Cluster
    from tidal_dist.planning.report import as_object, as_text

    check_range("--nodes", arguments.nodes, 1, float("inf"))
    check_range("--gpus-per-node", arguments.gpus_per_node, 1, 256)
    names = ("matmul_share", "attention_share", "network_gb_per_second", "overlap")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    for name, value in given.items():
        option, most = f"--{name.replace('_', '-')}", float("inf") if name == "network_gb_per_second" else 1.0
        check_range(option, value, 0.0 if name == "overlap" else 0.001, most)
    if arguments.gpu_hour_price is not None:
        check_range("--gpu-hour-price", arguments.gpu_hour_price, 0.0, float("inf"))
    config = load_config(arguments.config, arguments.overrides)
    cluster = Cluster(arguments.nodes, arguments.gpus_per_node, gpu_named(arguments.gpu))
    made = make(config, cluster, replace(Assumptions(), **given))
    suggestions = [] if made.fits else changes(config, made)
    price = arguments.gpu_hour_price
    report = as_object(made, suggestions, config.training.steps, price)
    return print_report(arguments, report, as_text(made, suggestions, config.training.steps, price))
