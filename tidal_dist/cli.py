"""`tidal ...`: parses, calls, prints. Heavy imports happen inside the commands."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError

Command = Callable[[argparse.Namespace], int]


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0, 1 if it found a fault, 2 for an error the user can mend, 130 after an interrupt."""
    arguments = parser().parse_args(argv)
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

    prepare = add("prepare", _prepare, "Turn a corpus into shards with their row plan.")
    add_config(prepare)
    prepare.add_argument("--overwrite", action="store_true", help="replace shards that are already there")

    add_config(add("plan-rows", _plan_rows, "Plan the rows of prepared shards for other row sizes."))

    export = add("export", _export, "Turn a training checkpoint into one folder of safetensors.")
    export.add_argument("source", type=Path, help="a run folder or a checkpoint")
    export.add_argument("out", type=Path, help="the folder to write")
    export.add_argument("--which", default="best", help="checkpoint of the run: best (default), last, or a step")

    verify = add("verify", _verify, "Check an export's files and repeat its probe batch.")
    verify.add_argument("export", type=Path)

    _add_generate(add("generate", _generate, "Continue prompts with an exported model."))

    _add_inspect(add("inspect", _inspect, "Show one document as the model sees it."))

    _add_doctor(add("doctor", _doctor, "Examine a model and its shards: ten suspects for bad text."))

    bench = add("bench", _bench, "Measure against a named baseline in the same run.")
    bench.add_argument("what", choices=["layout"], help="layout: the one-pass step against one sample per block")
    bench.add_argument(
        "--config", default="configs/stdlib.yaml", help="YAML file with the model (default: %(default)s)"
    )
    bench.add_argument("--blocks", type=int, default=1024, help="blocks of the document (default: %(default)s)")
    bench.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the configuration")
    return root


def _add_generate(sub: argparse.ArgumentParser) -> None:
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


def _add_inspect(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", type=Path, help="a shard folder, or an export")
    sub.add_argument("--document", type=int, metavar="N", help="a document of the shards, from 0")
    sub.add_argument("--split", choices=["train", "validation"], help="of the document; default: train")
    sub.add_argument("--piece", type=int, metavar="K", help="of a document that training cuts, from 0")
    sub.add_argument("--text", help="instead of a document: this text")
    sub.add_argument("--prompt", help="what precedes the text, and is not supervised")
    sub.add_argument("--model", type=Path, metavar="EXPORT", help="also show what this model says of it")
    sub.add_argument("--plot", type=Path, metavar="PNG", help="also draw it; with a model two more, named after this")


def _add_doctor(sub: argparse.ArgumentParser) -> None:
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


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _report(arguments: argparse.Namespace, report: dict[str, Any], text: str) -> int:
    print(json.dumps(report) if arguments.json else text)
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from data_pipeline.prepare import prepare
    from data_pipeline.rows import planned_rows
    from tidal_dist.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    manifest = prepare(
        config.corpus,
        config.tokenizer,
        config.segmentation,
        config.data,
        config.to_yaml(),
        arguments.overwrite,
        _log,
    )
    rows = planned_rows(manifest, config.data.row_tokens, config.data.row_chars)
    report: dict[str, Any] = {"shards": str(manifest.folder), "manifest_hash": manifest.hash, "splits": {}}
    for split, content in manifest.content["splits"].items():
        report["splits"][split] = {k: v for k, v in content.items() if k != "shards"}
        report["splits"][split] |= {"shards": len(content["shards"]), "rows": sum(rows[split])}
    report["read"] = manifest.content["read"]
    lines = [f"{manifest.folder}:"]
    for split, figures in report["splits"].items():
        lines.append(f"  {split}: " + ", ".join(f"{v:,} {k.replace('_', ' ')}" for k, v in figures.items()))
    lines.append("  read: " + ", ".join(f"{v:,} {k.replace('_', ' ')}" for k, v in report["read"].items()))
    return _report(arguments, report, "\n".join(lines))


def _plan_rows(arguments: argparse.Namespace) -> int:
    from data_pipeline.rows import planned_rows, write_row_plan
    from data_pipeline.shards import Manifest
    from tidal_dist.config import load_config

    data = load_config(arguments.config, arguments.overrides).data
    manifest = Manifest.load(data.shards)
    write_row_plan(manifest, data.row_tokens, data.row_chars)
    rows = {k: sum(v) for k, v in planned_rows(manifest, data.row_tokens, data.row_chars).items()}
    report = {"row_tokens": data.row_tokens, "row_chars": data.row_chars, "rows": rows}
    return _report(arguments, report, ", ".join(f"{split}: {n:,} rows" for split, n in rows.items()))


def _export(arguments: argparse.Namespace) -> int:
    from tidal_dist.export.consolidate import export

    report = export(arguments.source, arguments.out, arguments.which)
    text = (
        f"{report['export']}: {report['parameters']:,} parameters of step {report['step']}; probe loss "
        f"{report['probe_loss_export']:.6f} (checkpoint {report['probe_loss_checkpoint']:.6f})"
    )
    return _report(arguments, report, text)


def _verify(arguments: argparse.Namespace) -> int:
    from tidal_dist.export.package import verify_export

    loss = verify_export(arguments.export)
    return _report(arguments, {"export": str(arguments.export), "probe_loss": loss}, f"good; probe loss {loss:.6f}")


def _generate(arguments: argparse.Namespace) -> int:
    from tidal_dist.export.package import load_export
    from tidal_dist.generation.decoder import Decoder, Limits
    from tidal_dist.generation.report import as_object, as_text
    from tidal_dist.generation.sampling import Sampling

    _check_range("--temperature", arguments.temperature, 0.0, float("inf"))
    _check_range("--top-k", arguments.top_k, 0, float("inf"))
    _check_range("--top-p", arguments.top_p, 1e-9, 1.0)
    _check_range("--max-bytes", arguments.max_bytes, 1, float("inf"))
    _check_range("--batch-size", arguments.batch_size, 1, float("inf"))
    _check_range("--seed", arguments.seed, 0, 2**62)
    prompts = _prompts(arguments)
    exported = load_export(arguments.export)
    device = _device(arguments.device)
    decoder = Decoder(exported.model.to(device), exported.tokenizer, device)
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    results = decoder.generate_in_batches(prompts, sampling, Limits(arguments.max_bytes), arguments.batch_size)
    for prompt, result in zip(prompts, results, strict=True):
        if arguments.json:
            print(json.dumps(as_object(prompt, result, arguments.trace), ensure_ascii=False), flush=True)
        else:
            print(as_text(prompt, result, arguments.trace), flush=True)
    return 0


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available ({str(error).splitlines()[0]}); try --device cpu") from None
    return name


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


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        bounds = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise UserError(f"{name} {value:g}: must be {bounds}")


def _inspect(arguments: argparse.Namespace) -> int:
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

        draw(source, shown, reading, arguments.plot, _log)
    report = as_object(shown, source.tokenizer.name, reading)
    return _report(arguments, without_nan(report), as_text(report, wants_colour(sys.stdout)))


def _check_inspect(arguments: argparse.Namespace) -> None:
    from tidal_dist.generation.prompts import check_prompt

    if (arguments.document is None) == (arguments.text is None):
        raise UserError("give either --document N, of a shard folder, or --text T")
    owners = {"split": "document", "piece": "document", "prompt": "text"}
    for name, owner in owners.items():
        if getattr(arguments, name) is not None and getattr(arguments, owner) is None:
            raise UserError(f"--{name} goes with --{owner}; leave it out")
    for name in ("document", "piece"):
        _check_range(f"--{name}", getattr(arguments, name) or 0, 0, float("inf"))
    for name in ("prompt", "text"):
        check_prompt(getattr(arguments, name) or "", f"--{name}")
    if arguments.text == "":
        raise UserError("--text is empty; there is nothing to show")


def _doctor(arguments: argparse.Namespace) -> int:
    from tidal_dist.doctor.examine import examine
    from tidal_dist.doctor.page import write_page
    from tidal_dist.doctor.sizes import Sizes
    from tidal_dist.doctor.subject import load_subject

    for name in ("documents", "blocks", "rows"):
        _check_range(f"--{name}", getattr(arguments, name), 1, float("inf"))
    subject = load_subject(arguments.source, arguments.data, _device(arguments.device))
    sizes = Sizes(arguments.documents, arguments.blocks, arguments.rows)
    report, evidence = examine(subject, sizes, _log if sys.stderr.isatty() else bool)
    if arguments.html:
        write_page(report, evidence, arguments.html)
        _log(f"wrote {arguments.html}")
    _report(arguments, report.as_object(), report.as_text())
    return 0 if report.holds else 1


def _bench(arguments: argparse.Namespace) -> int:
    from tidal_dist.bench.layout import bench_layout, format_table
    from tidal_dist.config import load_config

    _check_range("--blocks", arguments.blocks, 2, float("inf"))
    result = bench_layout(load_config(arguments.config, arguments.overrides), arguments.blocks)
    return _report(arguments, result, format_table(result))


if __name__ == "__main__":
    sys.exit(main())
