"""The commands of trained models. Heavy imports happen inside."""

import argparse
import json
import sys
from pathlib import Path

from data_pipeline.errors import UserError
from tidal_dist.commands.output import check_range, log, print_report


def add_generate(sub: argparse.ArgumentParser) -> None:
    """Arguments of `tidal generate`."""
    sub.add_argument("export", type=Path, help="an exported folder")
    source = sub.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", help="a prompt; may be given again")
    source.add_argument("--input", metavar="FILE", help="prompts, one a line or JSON lines; - for standard input")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    sub.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest; 0: all")
    sub.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest of this total probability")
    sub.add_argument("--seed", type=int, default=0, help="of the first prompt; the next ones count on")
    sub.add_argument("--max-bytes", type=int, default=256, help="longest continuation (default: %(default)s)")
    sub.add_argument("--batch-size", type=int, default=64, help="prompts at a time (default: %(default)s)")
    sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto: a GPU if there is one")
    sub.add_argument("--trace", action="store_true", help="show each block: chars, turned text, tokens, positions")


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
    from tidal_dist.export.consolidate import export

    report = export(arguments.source, arguments.out, arguments.which)
    text = (
        f"{report['export']}: {report['parameters']:,} parameters of step {report['step']}; probe loss "
        f"{report['probe_loss_export']:.6f} (checkpoint {report['probe_loss_checkpoint']:.6f})"
    )
    return print_report(arguments, report, text)


def verify(arguments: argparse.Namespace) -> int:
    """`tidal verify`."""
    from tidal_dist.export.package import verify_export

    loss = verify_export(arguments.export)
    return print_report(
        arguments, {"export": str(arguments.export), "probe_loss": loss}, f"good; probe loss {loss:.6f}"
    )


def generate(arguments: argparse.Namespace) -> int:
    """`tidal generate`."""
    from tidal_dist.export.package import load_export
    from tidal_dist.generation.engine import Engine
    from tidal_dist.generation.report import as_object, as_text
    from tidal_dist.generation.request import Limits, requests_of
    from tidal_dist.generation.sampling import Sampling

    check_range("--temperature", arguments.temperature, 0.0, float("inf"))
    check_range("--top-k", arguments.top_k, 0, float("inf"))
    check_range("--top-p", arguments.top_p, 1e-9, 1.0)
    check_range("--max-bytes", arguments.max_bytes, 1, float("inf"))
    check_range("--batch-size", arguments.batch_size, 1, float("inf"))
    check_range("--seed", arguments.seed, 0, 2**62)
    prompts = _prompts(arguments)
    exported = load_export(arguments.export)
    device = _device(arguments.device)
    engine = Engine(exported.model.to(device), exported.tokenizer, device, arguments.batch_size)
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    results = engine.run(requests_of(prompts, sampling, Limits(arguments.max_bytes)))
    for prompt, result in zip(prompts, results, strict=True):
        if arguments.json:
            print(json.dumps(as_object(prompt, result, arguments.trace), ensure_ascii=False), flush=True)
        else:
            print(as_text(prompt, result, arguments.trace), flush=True)
    return 0


def _device(name: str) -> str:
    from tidal_dist.devices import available_device

    return available_device(name, "--device")


def _prompts(arguments: argparse.Namespace) -> list[str]:
    from tidal_dist.generation.prompts import check_prompt, read_prompts

    if arguments.prompt is not None:
        return [check_prompt(prompt, "--prompt") for prompt in arguments.prompt]
    if arguments.input is None and sys.stdin.isatty():
        raise UserError("no prompt: give --prompt, --input FILE, or prompts on standard input")
    if arguments.input in (None, "-"):
        return read_prompts(sys.stdin.buffer.read(), "standard input")
    try:
        return read_prompts(Path(arguments.input).read_bytes(), arguments.input)
    except OSError as error:
        raise UserError(f"{arguments.input}: cannot read ({error.strerror}); check --input") from None


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
    from tidal_dist.doctor.examine import examine
    from tidal_dist.doctor.page import write_page
    from tidal_dist.doctor.sizes import Sizes
    from tidal_dist.doctor.subject import load_subject

    for name in ("documents", "blocks", "rows"):
        check_range(f"--{name}", getattr(arguments, name), 1, float("inf"))
    subject = load_subject(arguments.source, arguments.data, _device(arguments.device))
    sizes = Sizes(arguments.documents, arguments.blocks, arguments.rows)
    report, evidence = examine(subject, sizes, log if sys.stderr.isatty() else bool)
    if arguments.html:
        write_page(report, evidence, arguments.html)
        log(f"wrote {arguments.html}")
    print_report(arguments, report.as_object(), report.as_text())
    return 0 if report.holds else 1
