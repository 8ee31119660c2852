"""What ZeRO costs: our engine under DeepSpeed against plain PyTorch DistributedDataParallel, two gloo ranks each.

`python benchmarks/zero_against_ddp.py` prepares a small corpus of sums and trains the model of `configs/demo.yaml` in
every way that is listed, from the same weights, on the same batches, with the same optimizer, in the same two
processes: each way in turn makes a few steps, round after round, so that what else the machine does meets all alike.
One CPU thread a rank. Prints a Markdown table: seconds and CPU seconds of a step (medians), their ratio to DDP's in
the same round (median), and how far the losses are apart at most.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from data_pipeline.arithmetic import write_corpus
from data_pipeline.errors import UserError
from data_pipeline.quarantine import QuarantineRecord
from data_pipeline.shards import Manifest
from data_pipeline.stream import Batch
from tidal_dist.bench.machine import describe_machine
from tidal_dist.config import Config, load_config
from tidal_dist.launching import free_port
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.training import engine as ds
from tidal_dist.training.data import open_data
from tidal_dist.training.phases import Phases

_RANKS = 2
_PROBLEMS = 20_000
_BASELINE = "DDP"
_ZERO = "deepspeed.zero_optimization"
# Name of a way: overrides of the configuration. The first is the baseline.
WAYS: dict[str, list[str]] = {
    _BASELINE: [],
    "ZeRO-0": ["training.zero_stage=0", "deepspeed={}"],
    "ZeRO-1": ["training.zero_stage=1", "deepspeed={}"],
    "ZeRO-2": ["training.zero_stage=2", "deepspeed={}"],
    "ZeRO-3, as DeepSpeed comes": ["deepspeed={}"],
    "ZeRO-3, configs/demo.yaml": [],
    "ZeRO-3, everything partitioned": [f"{_ZERO}.stage3_param_persistence_threshold=0"],
}


@dataclass
class Measured:
    """What one way did: per round seconds and CPU seconds of a step, and the loss of every step."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class Plain:
    """DistributedDataParallel behind the few methods of a DeepSpeed engine that a step calls."""

    def __init__(self, config: Config, build_model: Callable[[], nn.Module]):
        torch.manual_seed(config.training.seed)
        self.module = build_model()
        self.optimizer = ds._optimizer(self.module, config.training)
        self._parallel = DistributedDataParallel(self.module)
        self._max_norm, self._norm = config.training.max_gradient_norm, 0.0
        self.train = self._parallel.train

    def __call__(self, *arguments: Any) -> torch.Tensor:
        """The model's loss."""
        return self._parallel(*arguments)

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        """Gradients, averaged over the ranks."""
        assert not scale_wrt_gas
        loss.backward()

    def step(self) -> None:
        """Clip, and make the optimizer's step."""
        nn.utils.clip_grad_norm_(self.module.parameters(), self._max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(
    config_file: str, overrides: list[str], ways: dict[str, list[str]], rounds: int, steps: int, profile: str
) -> dict[str, Measured]:
    """All ways on this rank, interleaved; the first round is warm-up and not timed."""
    config = load_config(config_file, overrides)
    phases = Phases(ds.synchronize)
    found = {name: Measured() for name in ways}
    with ds.process_group(config.training, Path(config.run_dir)) as share:
        batches = _batches(config, share, (rounds + 1) * steps)
        # `memory_efficient_linear` replaces a function of PyTorch in the whole process: each way has its own.
        plain_linear, linear, engines = nn.functional.linear, {}, {}
        for name, way in ways.items():
            nn.functional.linear = plain_linear
            engines[name] = _engine(name, load_config(config_file, [*overrides, *way]))
            linear[name] = nn.functional.linear
        for number in range(rounds + 1):
            for name, engine in engines.items():
                profiler = _profiler() if name == profile and number and not share[0] else None
                nn.functional.linear = linear[name]
                dist.barrier()
                started, cpu_started = time.perf_counter(), time.process_time()
                for step in range(number * steps, (number + 1) * steps):
                    loss, _ = ds.pass_batches(engine, batches[step], phases)
                    ds.apply_step(engine, config.training.learning_rate, phases)
                    found[name].losses.append(loss)
                dist.barrier()
                if number:
                    found[name].seconds.append((time.perf_counter() - started) / steps)
                    found[name].cpu_seconds.append((time.process_time() - cpu_started) / steps)
                if profiler is not None:
                    profiler.disable()
                    _print_profile(profiler)
    return found


def _batches(config: Config, share: tuple[int, int], steps: int) -> list[list[Batch]]:
    manifest = Manifest.of(config.data)
    data = open_data(config, manifest, manifest.tokenizer(), QuarantineRecord(manifest.hash), share, False)
    return [next(data.stream).batches for _ in range(steps)]


def _engine(name: str, config: Config) -> Any:
    manifest = Manifest.of(config.data)
    tokenizer = manifest.tokenizer()

    def build_model() -> TidalTransformer:
        if name == _BASELINE:
            recompute = _recompute if config.training.activation_checkpointing else None
        else:
            recompute = ds.activation_checkpoint(config.training)
        return TidalTransformer(config.model, tokenizer.vocab_size, tokenizer.segmentation.max_block_bytes, recompute)

    return Plain(config, build_model) if name == _BASELINE else ds.build_engine(config, _RANKS, build_model)


def _recompute(function: Callable, *arguments: Any) -> Any:
    return checkpoint(function, *arguments, use_reentrant=False)


def _profiler() -> Any:
    import cProfile

    profiler = cProfile.Profile(time.thread_time)  # what the machine does besides is not counted
    profiler.enable()
    return profiler


def _print_profile(profiler: Any) -> None:
    import pstats

    pstats.Stats(profiler, stream=sys.stderr).sort_stats("cumulative").print_stats(90)


def _rank(rank: int, port: int, out: str, arguments: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(_RANKS),
        "LOCAL_WORLD_SIZE": str(_RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    found = measure(*arguments)
    if rank == 0:
        Path(out).write_text(json.dumps({name: vars(measured) for name, measured in found.items()}))


def table(found: dict[str, Measured]) -> str:
    """As Markdown."""
    baseline = found[_BASELINE]
    lines = ["| way | s a step | CPU s a step | ratio to DDP | CPU ratio | losses at most apart |", "|" + " --- |" * 6]
    for name, way in found.items():
        ratio = median(a / b for a, b in zip(way.seconds, baseline.seconds, strict=True))
        cpu_ratio = median(a / b for a, b in zip(way.cpu_seconds, baseline.cpu_seconds, strict=True))
        apart = max(abs(a - b) / abs(b) for a, b in zip(way.losses, baseline.losses, strict=True))
        lines.append(
            f"| {name} | {median(way.seconds):.4f} | {median(way.cpu_seconds):.4f} | {ratio:.2f} | {cpu_ratio:.2f} "
            f"| {apart:.1e} |"
        )
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="of each way in a round (default: %(default)s)")
    parser.add_argument("--way", action="append", help="only this way and the baseline; may be given again")
    parser.add_argument(
        "--try",
        dest="tried",
        action="append",
        default=[],
        metavar="NAME:KEY=VALUE,...",
        help="ZeRO-3 with these overrides too",
    )
    parser.add_argument("--profile", default="", metavar="WAY", help="print where the first rank's time goes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all measurements there")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of all ways")
    arguments = parser.parse_args()
    ways = {name: way for name, way in WAYS.items() if not arguments.way or name in [_BASELINE, *arguments.way]}
    ways |= {name: settings.split(";") for name, _, settings in (text.partition(":") for text in arguments.tried)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            overrides = [
                *_prepared(arguments.config, Path(folder)),
                "training.threads_per_rank=1",
                *arguments.overrides,
            ]
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        machine, out = describe_machine(), Path(folder) / "found.json"
        passed = (arguments.config, overrides, ways, arguments.rounds, arguments.steps, arguments.profile)
        mp.start_processes(_rank, (free_port(), str(out), passed), nprocs=_RANKS, start_method="spawn")
        found = {name: Measured(**values) for name, values in json.loads(out.read_text()).items()}
    print(machine, table(found), sep="\n")
    if arguments.json:
        content = {"machine": machine, "ways": {name: vars(measured) for name, measured in found.items()}}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def _prepared(config_file: str, folder: Path) -> list[str]:
    """Overrides that name shards of sums in a folder, after making them."""
    corpus = folder / "corpus.jsonl"
    overrides = [f"corpus.sources=[{{path: {corpus}, format: jsonl}}]", f"data.shards={folder}/shards"]
    write_corpus(corpus, _PROBLEMS, seed=1)
    command = [sys.executable, "-m", "tidal_dist.cli", "prepare", config_file, *overrides]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError("preparing the sums failed; see above")
    return overrides


if __name__ == "__main__":
    sys.exit(main())
