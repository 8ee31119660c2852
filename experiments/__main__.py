"""`python -m experiments run SET` measures, `python -m experiments report SET` makes tables and pictures of it."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import UserError, one_line

if TYPE_CHECKING:
    from experiments.spec import Experiment, Job

_HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 if a job failed, 2 for an error the user can mend, 130 after an interrupt."""
    arguments = parser().parse_args(argv)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return arguments.command(arguments)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    root = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = root.add_subparsers(metavar="command", required=True)
    run = commands.add_parser("run", help="train and evaluate all that has no result yet; stopped, it goes on")
    run.set_defaults(command=_run)
    run.add_argument("--only", nargs="+", default=[], metavar="NAME", help="experiments")
    run.add_argument("--variant", nargs="+", default=[], metavar="NAME", help="variants")
    run.add_argument("--jobs", type=int, metavar="N", help="so many at a time; default: the cores")
    run.add_argument("--redo", action="store_true", help="make anew what is of other sources or another configuration")
    report = commands.add_parser("report", help="results to tables in DOCS/RESULTS.md, pictures and JSON")
    report.set_defaults(command=_report)
    report.add_argument("--incomplete", action="store_true", help="also where results are missing, and say so there")
    report.add_argument("--docs", type=Path, default=_HERE.parent / "docs", metavar="FOLDER", help="default: docs")
    for sub in (run, report):
        sub.add_argument("set", metavar="SET", help="a folder of experiments: small, medium, full")
        sub.add_argument("--sets", type=Path, default=_HERE, metavar="FOLDER", help="where sets are; default: ours")
        sub.add_argument("--runs", type=Path, default=Path("runs/experiments"), metavar="FOLDER", help="%(default)s")
    return root


def _run(arguments: argparse.Namespace) -> int:
    from experiments.places import Places
    from experiments.runner import run
    from experiments.sources import sources_hash
    from experiments.spec import load_set

    at_once = arguments.jobs if arguments.jobs is not None else len(os.sched_getaffinity(0))
    if at_once < 1:
        raise UserError(f"--jobs {at_once}: must be at least 1")
    jobs = _chosen(load_set(arguments.sets / arguments.set), arguments.only, arguments.variant)
    places = Places(arguments.runs.resolve(), arguments.set, sources_hash())
    failed = run(jobs, places, at_once, arguments.redo, _say)
    if failed:
        _say(f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)}")
    return 1 if failed else 0


def _chosen(experiments: "list[Experiment]", only: list[str], variants: list[str]) -> "list[Job]":
    from experiments.spec import one_of

    by_name = {experiment.name: experiment for experiment in experiments}
    for name in only:
        one_of(name, by_name, "--only", "experiment")
    chosen = [by_name[name] for name in by_name if not only or name in only]
    there = {variant: None for experiment in chosen for variant in experiment.spec.variants}
    for name in variants:
        one_of(name, there, "--variant", "variant")
    return [job for experiment in chosen for job in experiment.jobs if not variants or job.variant in variants]


def _report(arguments: argparse.Namespace) -> int:
    from experiments.report import report

    for path in report(arguments.sets, arguments.set, arguments.runs, arguments.docs, arguments.incomplete):
        print(path)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
