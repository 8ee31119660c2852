"""The whole path on one machine, as `make demo` runs it: corpus, shards, ZeRO-3 training, export, sums.

Ends with `report.json` in the run folder; every figure in it was measured in this run.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.arithmetic import held_out_problems, write_corpus
from data_pipeline.errors import UserError
from data_pipeline.files import replace_file
from tidal_dist.config import Config, load_config
from tidal_dist.export.consolidate import export
from tidal_dist.export.package import load_export
from tidal_dist.generation.engine import Engine
from tidal_dist.generation.request import Limits, Request, requests_of
from tidal_dist.launching import local_ranks, training_command

_EXAMPLES = ["12 + 34 =", "999 + 1 =", "5000 - 4999 =", "17 - 4242 =", "-31 + 64 =", "9876 + 5432 ="]


@dataclass(frozen=True)
class Report:
    """What the demo measured. `exact_match`: share of unseen problems whose whole answer and end mark are right."""

    exact_match: float
    exact_match_4x4: float
    train_seconds: float
    total_seconds: float
    ranks: int
    zero_stage: int
    activation_checkpointing: bool
    probe_loss_checkpoint: float
    probe_loss_export: float
    parameters: int


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--problems", type=int, default=300_000, help="training problems in the corpus")
    parser.add_argument("--questions", type=int, default=1000, help="unseen problems asked at the end, of each kind")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
        report = run(
            config, arguments.config, arguments.overrides, arguments.ranks, arguments.problems, arguments.questions
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(map(str, error.cmd))} ended with exit code {error.returncode}", file=sys.stderr)
        return 1
    print(Path(config.run_dir) / "report.json", report, sep="\n")
    return 0


def run(config: Config, config_file: str, overrides: list[str], ranks: int, problems: int, questions: int) -> Report:
    """Every step, one after the other."""
    started = time.monotonic()
    folder = Path(config.run_dir)
    if (folder / "checkpoints").exists():
        raise UserError(f"{folder}: holds an earlier run; remove it first (`make clean` does)")
    bin_folder = Path(sys.executable).parent
    _say(f"writing {problems:,} problems to {config.corpus.sources[0].path}")
    write_corpus(Path(config.corpus.sources[0].path), problems, seed=1)
    _call([bin_folder / "tidal", "prepare", config_file, *overrides, "--overwrite"])
    training_started = time.monotonic()
    _call(training_command(config_file, overrides, local_ranks(ranks)))
    train_seconds = time.monotonic() - training_started
    _say(f"trained in {train_seconds:.0f} s; exporting")
    exported = export(folder, folder / "export")
    _say(f"asking {2 * questions:,} problems that never occurred in training")
    report = Report(
        exact_match=exact_match(folder / "export", held_out_problems(questions, seed=1)),
        exact_match_4x4=exact_match(folder / "export", held_out_problems(questions, seed=1, digits=4)),
        train_seconds=round(train_seconds, 1),
        total_seconds=round(time.monotonic() - started, 1),
        ranks=ranks,
        zero_stage=config.training.zero_stage,
        activation_checkpointing=config.training.activation_checkpointing,
        probe_loss_checkpoint=exported["probe_loss_checkpoint"],
        probe_loss_export=exported["probe_loss_export"],
        parameters=exported["parameters"],
    )
    replace_file(folder / "report.json", (json.dumps(asdict(report), indent=1) + "\n").encode())
    _call([bin_folder / "tidal", "generate", folder / "export", *(f"--prompt={p}" for p in _EXAMPLES)])
    return report


def exact_match(folder: Path, problems: list[tuple[str, str]]) -> float:
    """Share of (prompt, answer) that the exported model answers exactly, `<eos>` included."""
    exported = load_export(folder)
    engine = Engine(exported.model, exported.tokenizer, batch_size=250)
    results = engine.run(requests_of([p for p, _ in problems], Request("", limits=Limits(max_bytes=16))))
    right = [r.text == answer and r.finish == "eos" for r, (_, answer) in zip(results, problems, strict=True)]
    return sum(right) / len(right)


def _call(command: Sequence[str | Path]) -> None:
    _say("$ " + " ".join(map(str, command)))
    subprocess.run(command, check=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
