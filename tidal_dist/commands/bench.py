"""`tidal bench`. Heavy imports happen inside."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from tidal_dist.commands.output import check_range, log, print_report

_WHAT = (
    "layout: one pass over a document against one sample per block; attention: against dense attention with a mask; "
    "train: a step against plain decoders, by char layers; data: preparing against encode_batch, reading, planning; "
    "generate: decoding against no cache, one by one, and memory bandwidth; all: all of them"
)

# Which benches an option concerns; `all` has every one.
_CONCERNS = {
    "blocks": ("layout", "generate"),
    "megabytes": ("data",),
    "rows": ("train",),
    "rounds": ("train", "attention"),
    "device": ("train", "attention", "generate"),
    "dtype": ("train", "attention", "generate"),
    "compile": ("train", "generate"),
    "profile": ("train",),
}


def add_bench(sub: argparse.ArgumentParser) -> None:
    """Arguments of `tidal bench`."""
    sub.add_argument("what", choices=["layout", "attention", "train", "data", "generate", "all"], help=_WHAT)
    sub.add_argument("--config", default="configs/stdlib.yaml", help="YAML file with the model (default: %(default)s)")
    sub.add_argument("--quick", action="store_true", help="small sizes: all in less than three minutes on two cores")
    sub.add_argument("--blocks", type=int, help="layout: of the document (1024); generate: to write (500)")
    sub.add_argument("--megabytes", type=int, help="data: MB of text (1000)")
    sub.add_argument("--rows", type=int, help="train: rows of a step (2)")
    sub.add_argument("--rounds", type=int, help="train, attention: repeats, all ways in turns (5)")
    sub.add_argument("--device", help="of train, attention and generate: cpu, cuda, ...; auto: a GPU if there is one")
    sub.add_argument("--dtype", choices=["fp32", "bf16"], help="there; default bf16 on a GPU, fp32 elsewhere")
    sub.add_argument("--compile", action="store_true", help="train, generate: compile the layers first")
    sub.add_argument("--plots", type=Path, metavar="FOLDER", help="also draw FOLDER/BENCH.png")
    sub.add_argument("--profile", type=Path, metavar="FILE", help="train: also write a Chrome trace of a step")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the configuration")


def bench(arguments: argparse.Namespace) -> int:
    """`tidal bench`."""
    _check(arguments)
    from tidal_dist.bench.run import format_table, run_all, run_bench

    asked = _asked(arguments)
    if arguments.what == "all":
        results = run_all(asked, arguments.quick)
    else:
        results = {arguments.what: run_bench(arguments.what, asked)}
    if arguments.plots:
        _draw(results, arguments.plots)
    tables = [format_table(result) for result in results.values()]
    if arguments.what != "all":
        return print_report(arguments, results[arguments.what], tables[0])
    titled = [f"== {name}\n{table}" for name, table in zip(results, tables, strict=True)]
    return print_report(arguments, {"name": "all", "results": results}, "\n\n".join(titled))


def _check(arguments: argparse.Namespace) -> None:
    """Raises UserError where an option is out of bounds or concerns another bench."""
    for name, benches in _CONCERNS.items():
        if getattr(arguments, name) and arguments.what not in (*benches, "all"):
            raise UserError(f"--{name} goes with `tidal bench {' or '.join(benches)}`; leave it out")
    for name, least in (("blocks", 2), ("megabytes", 1), ("rows", 1), ("rounds", 1)):
        if getattr(arguments, name) is not None:
            check_range(f"--{name}", getattr(arguments, name), least, float("inf"))
    for name in ("plots", "profile"):
        path = getattr(arguments, name)
        folder = path if name == "plots" else path and path.parent
        if folder and not folder.is_dir():
            raise UserError(f"--{name} {path}: {folder} is no folder; make it first")


def _asked(arguments: argparse.Namespace) -> Any:
    from tidal_dist.bench.run import QUICK, Asked, Sizes
    from tidal_dist.bench.steps import Conditions
    from tidal_dist.config import load_config
    from tidal_dist.devices import available_device

    config = load_config(arguments.config, arguments.overrides)
    device = available_device(arguments.device or "auto", "--device")
    dtype = arguments.dtype or ("bf16" if device.startswith("cuda") else "fp32")
    training = config.training
    again = training.activation_checkpoint_every_layers if training.activation_checkpointing else 0
    given = {n: getattr(arguments, n) for n in ("blocks", "megabytes", "rows", "rounds")}
    given["written_blocks"] = arguments.blocks
    sizes = replace(QUICK if arguments.quick else Sizes(), **{n: v for n, v in given.items() if v is not None})
    conditions = Conditions(device, dtype, training.attention, arguments.compile, again)
    return Asked(config, sizes, conditions, arguments.profile, log)


def _draw(results: dict[str, Any], folder: Path) -> None:
    from tidal_dist.bench.pictures import picture
    from tidal_dist.plots.canvas import save

    for name, result in results.items():
        save(picture(result), folder / f"{name}.png")
        log(f"wrote {folder / name}.png")
