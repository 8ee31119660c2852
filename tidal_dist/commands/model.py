"""The commands of trained models. Heavy imports happen inside."""

import argparse
import re
import sys
from dataclasses import asdict
from pathlib import Path

from data_pipeline.errors import UserError
from tidal_dist.commands.output import check_range, log, print_report


def add_export(sub: argparse.ArgumentParser) -> None:
    """Arguments of `tidal export`."""
    sub.add_argument("source", type=Path, help="a run folder or a checkpoint")
    sub.add_argument("out", type=Path, help="the folder to write")
    sub.add_argument(
        "--which", default="best", help="of a run: best (default), last, a step, or ema: the average of its checkpoints"
    )
    sub.add_argument(
        "--ema-decay",
        type=float,
        default=0.9,
        help="how much a checkpoint counts beside the next (default: %(default)s)",
    )
    sub.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="default: as trained, fp32")
    sub.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="of a file of weights: 500MB, 2GiB (default: %(default)s)",
    )


def _bytes_of(name: str, text: str) -> int:
    """A size such as 5GB in bytes.

    Raises:
        UserError: it is none.
    """
    powers = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    size = 0
    if match:
        unit = 1024 if match[3] else 1000
        size = int(float(match[1]) * unit ** powers[match[2].upper()])
    if size < 1:
        raise UserError(f"{name} {text}: no size; give one such as 500MB or 5GB")
    return size


def add_inspect(sub: argparse.ArgumentParser) -> None:
    """Arguments of `tidal inspect`."""
    sub.add_argument("source", type=Path, help="a shard folder, or an export")
    sub.add_argument("--document", type=int, metavar="N", help="a document of the shards, from 0")
    sub.add_argument("--split", choices=["train", "validation"], help="of the document; default: train")
    sub.add_argument("--piece", type=int, metavar="K", help="of a document that training cuts, from 0")
    sub.add_argument("--text", help="instead of a document: this text")
    sub.add_argument("--prompt", help="what precedes the text, and is not supervised")
    sub.add_argument("--model", type=Path, metavar="EXPORT", help="also show what this model says of it")
    sub.add_argument("--plot", type=Path, metavar="PNG", help="also draw it; with a model two more, named after this")


def add_doctor(sub: argparse.ArgumentParser) -> None:
    """Arguments of `tidal doctor`."""
    from tidal_dist.doctor.sizes import DEFAULT_SIZES

    sub.add_argument("source", type=Path, help="an export, a checkpoint, or a run (its best checkpoint)")
    sub.add_argument("--data", type=Path, required=True, metavar="SHARDS", help="the shards it was trained on")
    sub.add_argument("--html", type=Path, metavar="FILE", help="also write a page with pictures")
    sizes = {
        "documents": "documents to decode",
        "blocks": "blocks of each document",
        "rows": "rows of the shards to read",
    }
    for name, text in sizes.items():
        default = getattr(DEFAULT_SIZES, name)
        sub.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: %(default)s)")
    sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto: a GPU if there is one")


def export(arguments: argparse.Namespace) -> int:
    """`tidal export`."""
    check_range("--ema-decay", arguments.ema_decay, 0.0, 1.0)
    max_file_bytes = _bytes_of("--max-shard-size", arguments.max_shard_size)
    from tidal_dist.export.consolidate import Choice, export

    choice = Choice(arguments.which, arguments.ema_decay, arguments.dtype, max_file_bytes)
    report = export(arguments.source, arguments.out, choice)
    average = f" and {len(report['averaged']) - 1} before it, averaged" if report["averaged"] else ""
    first = (
        f"{report['export']}: {report['parameters']:,} parameters of step {report['step']}{average}, {report['dtype']}"
    )
    return print_report(arguments, report, "\n  ".join([first, *report["proof"]]))


def verify(arguments: argparse.Namespace) -> int:
    """`tidal verify`."""
    from tidal_dist.export.proof import verify_export

    proof = verify_export(arguments.export)
    report = {"export": str(arguments.export)} | asdict(proof)
    return print_report(arguments, report, "\n  ".join(["good", *proof.lines()]))


def inspect(arguments: argparse.Namespace) -> int:
    """`tidal inspect`."""
    _check_inspect(arguments)
    from tidal_dist.inspection.document import given_text, open_source, stored_document
    from tidal_dist.inspection.reading import read
    from tidal_dist.inspection.report import as_object, without_nan
    from tidal_dist.inspection.text import as_text, wants_colour

    source = open_source(arguments.source, arguments.model)
    if arguments.text is None:
        shown = stored_document(source, arguments.split or "train", arguments.document, arguments.piece)
    else:
        shown = given_text(source, arguments.prompt or "", arguments.text)
    reading = read(source.model, shown) if source.model is not None else None
    if arguments.plot:
        from tidal_dist.inspection.pictures import draw

        draw(source, shown, reading, arguments.plot, log)
    report = as_object(shown, source.tokenizer.name, reading)
    return print_report(arguments, without_nan(report), as_text(report, wants_colour(sys.stdout)))


def _check_inspect(arguments: argparse.Namespace) -> None:
    from tidal_dist.generation.prompts import check_prompt

    if (arguments.document is None) == (arguments.text is None):
        raise UserError("give either --document N, of a shard folder, or --text T")
    owners = {"split": "document", "piece": "document", "prompt": "text"}
    for name, owner in owners.items():
        if getattr(arguments, name) is not None and getattr(arguments, owner) is None:
            raise UserError(f"--{name} goes with --{owner}; leave it out")
    for name in ("document", "piece"):
        check_range(f"--{name}", getattr(arguments, name) or 0, 0, float("inf"))
    for name in ("prompt", "text"):
        check_prompt(getattr(arguments, name) or "", f"--{name}")
    if arguments.text == "":
        raise UserError("--text is empty; there is nothing to show")


def doctor(arguments: argparse.Namespace) -> int:
    """`tidal doctor`; 1 if a check fails."""
    from tidal_dist.devices import available_device
    from tidal_dist.doctor.examine import examine
    from tidal_dist.doctor.page import write_page
    from tidal_dist.doctor.sizes import Sizes
    from tidal_dist.doctor.subject import load_subject

    for name in ("documents", "blocks", "rows"):
        check_range(f"--{name}", getattr(arguments, name), 1, float("inf"))
    subject = load_subject(arguments.source, arguments.data, available_device(arguments.device, "--device"))
    sizes = Sizes(arguments.documents, arguments.blocks, arguments.rows)
    report, evidence = examine(subject, sizes, log if sys.stderr.isatty() else bool)
    if arguments.html:
        write_page(report, evidence, arguments.html)
        log(f"wrote {arguments.html}")
    print_report(arguments, report.as_object(), report.as_text())
    return 0 if report.holds else 1
