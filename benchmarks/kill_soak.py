"""A small training on sums, killed with SIGKILL at random moments, resumed each time, compared with itself undisturbed.

`python benchmarks/kill_soak.py` kills 100 times on two ranks, then `--elastic` with 1, 2 or 4 ranks at each start.
Kills take the whole process tree or one rank; two in five are aimed at saving. Exit code 0: every start went on from
the newest complete checkpoint, and losses, rolling hashes, weights and optimizer states are those of the undisturbed
run, bit for bit (on other numbers of ranks: the rolling hashes, and losses within 1e-3).
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from data_pipeline.arithmetic import write_corpus
from data_pipeline.errors import UserError
from tidal_dist.bench.machine import describe_machine
from tidal_dist.config import load_config
from tidal_dist.drill.soak import Plan, soak

_PROBLEMS = 20_000


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=120.0, help="for all kills, at most (default: %(default)g)")
    parser.add_argument("--elastic", action="store_true", help="1, 2 or 4 ranks at each start instead of 2")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"), help="emptied first (default: %(default)s)")
    parser.add_argument("--config", default="configs/demo.yaml", help="what is not overridden (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    arguments = parser.parse_args()
    overrides = _small_model(arguments.folder, arguments.elastic)
    try:
        shutil.rmtree(arguments.folder, ignore_errors=True)
        _prepare(arguments.config, overrides)
        ranks = (2, 1, 4) if arguments.elastic else (2,)
        plan = Plan(
            arguments.config, overrides, arguments.folder, arguments.kills, ranks, arguments.seed, arguments.minutes
        )
        report = soak(plan, lambda text: print(text, file=sys.stderr, flush=True))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        content = {"machine": describe_machine(), "seed": arguments.seed} | report.as_object()
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    print(report.as_text())
    return 0 if report.holds else 1


def _small_model(folder: Path, elastic: bool) -> list[str]:
    """Overrides that make a step and a save take milliseconds, so that starts are what takes the time."""
    return [
        f"corpus.sources=[{{path: {folder}/corpus.jsonl, format: jsonl}}]",
        f"data.shards={folder}/shards",
        "data.lanes=4",
        "training.batch_rows=8",
        "training.warmup_steps=20",
        "model.n_layers=2",
        "model.width=32",
        "model.n_heads=2",
        # Dropout draws anew for every rank, so that another number of ranks has other losses.
        f"model.dropout={0.0 if elastic else 0.1}",
        "validation.rows=8",
        "validation.prompts=4",
        "validation.max_bytes=8",
    ]


def _prepare(config_file: str, overrides: list[str]) -> None:
    write_corpus(Path(load_config(config_file, overrides).corpus.sources[0].path), _PROBLEMS, seed=1)
    command = [sys.executable, "-m", "tidal_dist.cli", "prepare", config_file, *overrides]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError("preparing the sums failed; see above")


if __name__ == "__main__":
    sys.exit(main())
