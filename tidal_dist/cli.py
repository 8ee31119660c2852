"""`tidal ...`: parses, calls, prints. Heavy imports happen inside the commands."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from data_pipeline.errors import UserError
from tidal_dist.commands import bench, cluster, data, generating, model, run

Command = Callable[[argparse.Namespace], int]


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0, 1 if it found a fault, 2 for an error the user can mend, 130 after an interrupt."""
    arguments = _parsed(argv)
    try:
        return arguments.command(arguments)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # What is still buffered is flushed at exit, which would fail again and change the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand behind options too, where argparse does not look for them."""
    root = parser()
    arguments, others = root.parse_known_args(argv)
    overrides = [other for other in others if "=" in other and not other.startswith("-")]
    if others != overrides or (others and not hasattr(arguments, "overrides")):
        root.error(f"unrecognized arguments: {' '.join(others)}")
    if others:
        arguments.overrides = [*arguments.overrides, *others]
    return arguments


def parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    root = argparse.ArgumentParser(prog="tidal", description="Train and run the TidalTransformer.")
    commands = root.add_subparsers(metavar="command", required=True)

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("--json", action="store_true", help="one JSON object on standard output")
        return sub

    def add_config(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("config", help="YAML file of the run")
        sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the configuration")

    prepare = add("prepare", data.prepare, "Turn a corpus into shards with their row plan.")
    add_config(prepare)
    prepare.add_argument("--overwrite", action="store_true", help="replace shards that are already there")
    prepare.add_argument("--restart", action="store_true", help="discard what an unfinished preparation left")
    prepare.add_argument("--status", action="store_true", help="show how far a preparation is, and do nothing")

    add_config(add("plan-rows", data.plan_rows, "Plan the rows of prepared shards for other row sizes."))

    data.add_shards(add("shards", data.shards, "Check a shard folder, or show what it holds."))

    launch = add("launch", cluster.launch, "Train on the hosts of a hostfile, and see that it goes on.")
    add_config(launch)
    cluster.add_launch(launch)

    check = add("preflight", cluster.preflight, "Look at every host of a job and try them together; 1 for no-go.")
    add_config(check)
    cluster.add_preflight(check)

    rehearsal = add("drill", run.drill, "Rehearse a job: a few steps, killed, resumed, exported; 1 for no-go.")
    add_config(rehearsal)
    run.add_drill(rehearsal)

    model.add_export(add("export", model.export, "Turn a training checkpoint into one folder of safetensors, proven."))

    verify = add("verify", model.verify, "Prove an export anew: its files, tensors, probe batch, texts, tokeniser.")
    verify.add_argument("export", type=Path)

    generating.add_generate(add("generate", generating.generate, "Continue prompts with an exported model."))

    generating.add_serve(add("serve", generating.serve, "Serve an exported model: OpenAI's completions, and a page."))

    model.add_inspect(add("inspect", model.inspect, "Show one document as the model sees it."))

    model.add_doctor(add("doctor", model.doctor, "Examine a model and its shards: ten suspects for bad text."))

    data.add_explain(add("explain", data.explain, "Show which documents the rows of a training step held."))

    audit = add("audit", data.audit, "Compare the rows that two runs saw; 1 if they differ.")
    audit.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="run folder")

    run.add_diagnose(add("diagnose", run.diagnose, "Say how a run is: who hangs, has ended, is slow; 1 if any."))
    run.add_report(add("report", run.report, "Write a page about a run: curves, data, restarts, what it writes."))
    run.add_plan(add("plan", run.plan, "Reckon what a run needs and costs on a cluster, before renting one."))

    bench.add_bench(add("bench", bench.bench, "Measure against a named baseline in the same run."))
    return root


if __name__ == "__main__":
    sys.exit(main())
