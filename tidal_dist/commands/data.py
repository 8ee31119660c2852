"""The commands of corpora, shards and the order of rows. Heavy imports happen inside."""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import UserError
from tidal_dist.commands.output import check_range, log, print_report

if TYPE_CHECKING:
    from data_pipeline.storage import Storage


def add_shards(sub: argparse.ArgumentParser) -> None:
    """Arguments of `tidal shards`."""
    sub.add_argument(
        "what", choices=["verify", "info"], help="verify: every file against its hash; info: what is there"
    )
    sub.add_argument("folder", help="a shard folder, or its URL")
    sub.add_argument("--row-tokens", type=int, metavar="T", help="info: the rows to find the best C for")
    sub.add_argument("--plot", type=Path, metavar="PNG", help="info: also draw it")
    sub.add_argument("--storage-option", action="append", default=[], metavar="KEY=VALUE", help="of the URL's client")
    sub.add_argument("--cache", metavar="FOLDER", help="where files of a URL are kept")


def add_explain(sub: argparse.ArgumentParser) -> None:
    """Arguments of `tidal explain`."""
    sub.add_argument("--run", type=Path, required=True, help="run folder")
    sub.add_argument("--step", type=int, required=True, metavar="N", help="from 1, as in logs and TensorBoard")
    sub.add_argument("--rank", type=int, metavar="R", help="only the rows of this rank")
    sub.add_argument("--ranks", type=int, metavar="W", help="how many there were; default: by the newest checkpoint")
    sub.add_argument("--full", action="store_true", help="give the texts whole")
    sub.add_argument("--data", type=Path, metavar="SHARDS", help="where the shards are now, if they have moved")


def prepare(arguments: argparse.Namespace) -> int:
    """`tidal prepare`."""
    from data_pipeline import prepare as preparing
    from data_pipeline.preparing import slurm
    from tidal_dist import prepare_report
    from tidal_dist.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    request = preparing.Request(
        config.corpus,
        config.tokenizer,
        config.segmentation,
        config.data,
        config.model_copy(update={"prepare": config.prepare.of_result()}).to_yaml(),
        config.prepare,
        arguments.overwrite,
        arguments.restart,
    )
    if arguments.status:
        report = prepare_report.status_as_object(request.folder, preparing.status(request))
        return print_report(arguments, report, prepare_report.status_as_text(report))
    # Tasks that run in this process have standard error turned away from the terminal.
    terminal = sys.stderr
    say = partial(print, file=terminal, flush=True)
    if config.prepare.executor == "slurm":
        result = slurm.submit(request, say)
    else:
        result = preparing.run(request, say, terminal if terminal.isatty() else None)
    if isinstance(result, slurm.Submitted):
        report = prepare_report.status_as_object(request.folder, preparing.status(request), result.jobs)
        return print_report(arguments, report, prepare_report.status_as_text(report))
    report = prepare_report.as_object(result, config.data)
    return print_report(arguments, report, prepare_report.as_text(report))


def plan_rows(arguments: argparse.Namespace) -> int:
    """`tidal plan-rows`."""
    from data_pipeline.rows import read_row_plan, row_format_of, write_row_plan
    from data_pipeline.shards import Manifest
    from tidal_dist.config import load_config

    data = load_config(arguments.config, arguments.overrides).data
    manifest, row_format = Manifest.of(data), row_format_of(data)
    write_row_plan(manifest, row_format)
    rows = {split: sum(p["rows"] for p in plans) for split, plans in read_row_plan(manifest, row_format).items()}
    report = {"row_tokens": data.row_tokens, "row_chars": data.row_chars, "rows": rows}
    return print_report(arguments, report, ", ".join(f"{split}: {n:,} rows" for split, n in rows.items()))


def shards(arguments: argparse.Namespace) -> int:
    """`tidal shards`."""
    from data_pipeline.storage import Storage

    if wrong := [option for option in arguments.storage_option if "=" not in option]:
        raise UserError(f"--storage-option {wrong[0]}: write KEY=VALUE")
    options = dict(option.split("=", 1) for option in arguments.storage_option)
    storage = Storage(arguments.folder, arguments.cache, options=options)
    return (_verify_shards if arguments.what == "verify" else _shards_info)(arguments, storage)


def _verify_shards(arguments: argparse.Namespace, storage: "Storage") -> int:
    from tqdm import tqdm

    from data_pipeline.verify import verify
    from tidal_dist.shard_report import faults_as_text

    with tqdm(unit="file", file=sys.stderr, disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:

        def move(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        faults = verify(storage, move)
    report = {"shards": storage.location, "faults": [vars(fault) for fault in faults]}
    print_report(arguments, report, faults_as_text(storage.location, faults))
    return 1 if faults else 0


def _shards_info(arguments: argparse.Namespace, storage: "Storage") -> int:
    from data_pipeline.shards import Manifest
    from data_pipeline.summary import summarize
    from tidal_dist.shard_report import summary_as_text

    check_range("--row-tokens", arguments.row_tokens or 2, 2, float("inf"))
    summary = summarize(Manifest.load(storage), arguments.row_tokens)
    if arguments.plot:
        from tidal_dist.plots.canvas import save
        from tidal_dist.plots.shards import shards_figure

        save(shards_figure(summary), arguments.plot)
        log(f"wrote {arguments.plot}")
    return print_report(arguments, summary, summary_as_text(summary))


def explain(arguments: argparse.Namespace) -> int:
    """`tidal explain`."""
    from tidal_dist.history.explain import as_text, explain
    from tidal_dist.history.past import open_run

    if arguments.ranks is not None:
        check_range("--ranks", arguments.ranks, 1, float("inf"))
    run = open_run(arguments.run, arguments.data)
    report = explain(run, arguments.step, arguments.rank, arguments.ranks, arguments.full)
    return print_report(arguments, report, as_text(report))


def audit(arguments: argparse.Namespace) -> int:
    """`tidal audit`; 1 if the runs differ."""
    from tidal_dist.history.audit import as_text, audit

    report = audit(*arguments.runs)
    print_report(arguments, report, as_text(report))
    return 0 if report["same"] else 1
