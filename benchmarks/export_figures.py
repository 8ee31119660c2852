"""What exporting takes: memory beyond an interpreter that has imported torch, and time beside copying the files.

`OMP_NUM_THREADS=2 python -m benchmarks.export_figures FOLDER` writes a ZeRO-3 checkpoint of 4 ranks into FOLDER (random
weights, files laid out as DeepSpeed's, which a test compares with those of a real run), then exports it. Needs five
times the weights on the disk and twice in memory. Before each part the files are dropped from the page cache. A process
is watched from outside; phases are told by what appears in the folder that it writes. Prints a Markdown table.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.builders import document_of, packed, small_tokenizer
from tests.checkpoints import PROMPTS, write_checkpoint
from tidal_dist.bench.machine import describe_machine
from tidal_dist.config import ModelConfig
from tidal_dist.generation.decoder import Decoder
from tidal_dist.generation.request import Limits
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.provenance import StoredText

_POLL_SECONDS = 0.005
_RANKS = 4
_ROW = (512, 1024)


@dataclass
class Watched:
    """A process: peaks in bytes, of all its pages and of those that are no file's; seconds until files appeared."""

    peak: int = 0
    anonymous: int = 0
    seconds: float = 0.0
    seen: dict[str, float] = field(default_factory=dict)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    checkpoint = _checkpoint(arguments.folder, arguments.layers, arguments.width)
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    base = min(_watched([sys.executable, "-c", "import torch"]).peak for _ in range(3))
    print(f"{json.dumps(describe_machine())}\n\n{sum(p.stat().st_size for p in files) / 1e9:.2f} GB of files\n")
    print("| round | copy | check | write | prove | all | all / copy | peak, beyond torch | no file's | verify, peak |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for number in range(arguments.rounds):
        copying = _copy(files, arguments.folder / "copy")
        out = arguments.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        _drop(files)
        exported = _watched([sys.executable, "-m", "tidal_dist.cli", "export", str(checkpoint), str(out)], out)
        _drop(list(out.iterdir()))
        verified = _watched([sys.executable, "-m", "tidal_dist.cli", "verify", str(out)])
        begun, written = exported.seen["folder"], exported.seen["config.json"]
        cells = [
            f"{copying:.1f} s",
            f"{begun:.1f} s",
            f"{written - begun:.1f} s",
            f"{exported.seconds - written:.1f} s",
        ]
        cells += [f"{exported.seconds:.1f} s", f"{exported.seconds / copying:.2f}"]
        cells += [_mb(exported.peak - base), _mb(exported.anonymous)]
        cells += [f"{verified.seconds:.1f} s, {_mb(verified.peak - base)}"]
        print(f"| {number + 1} | {' | '.join(cells)} |", flush=True)
    print(f"\nthe interpreter with torch: {_mb(base)}")
    return 0


def _checkpoint(folder: Path, layers: int, width: int) -> Path:
    tokenizer = small_tokenizer()
    config = ModelConfig(n_layers=layers, width=width, n_heads=width // 64)
    torch.manual_seed(1)
    model = TidalTransformer(config, tokenizer.vocab_size, tokenizer.segmentation.max_block_bytes).eval()
    probe = packed([[document_of("the tide runs out and the tide comes in " * 19)]], tokenizer, _ROW)
    results = Decoder(model, tokenizer).generate(PROMPTS, limits=Limits(24))
    texts = [StoredText(list(p), list(r.blocks), r.finish, 24, None) for p, r in zip(PROMPTS, results, strict=True)]
    shutil.rmtree(folder / "run", ignore_errors=True)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {parameters * 4 / 1e9:.2f} GB in float32, {_RANKS} ranks, ZeRO-3")
    return write_checkpoint(folder / "run" / "checkpoints", 1, model, tokenizer, probe, 3, _RANKS, texts)


def _copy(files: list[Path], out: Path) -> float:
    """Seconds to copy files, onto the disk."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    _drop(files)
    began = time.monotonic()
    for path in files:
        with open(path, "rb") as source, open(out / path.name, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 22)
            target.flush()
            os.fsync(target.fileno())
    seconds = time.monotonic() - began
    shutil.rmtree(out)
    return seconds


def _drop(files: list[Path]) -> None:
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _watched(command: list[str], out: Path | None = None) -> Watched:
    found, began = Watched(), time.monotonic()
    partial = out.with_name(f".{out.name}.partial") if out else None
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status = Path("/proc") / str(process.pid) / "status"
    while True:
        ended = process.poll() is not None
        found.seconds = time.monotonic() - began
        if ended:
            break
        if partial is not None:
            for name, path in (("folder", partial), ("config.json", partial / "config.json")):
                if name not in found.seen and path.exists():
                    found.seen[name] = found.seconds
        # VmHWM is the peak that the kernel has seen; what a process has had before it was replaced does not count.
        sizes = _sizes(status)
        found.peak = max(found.peak, sizes.get("VmHWM", 0))
        found.anonymous = max(found.anonymous, sizes.get("RssAnon", 0))
        time.sleep(_POLL_SECONDS)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return found


def _sizes(status: Path) -> dict[str, int]:
    pairs = (line.partition(":") for line in status.read_text().splitlines())
    return {name: int(value.split()[0]) * 1024 for name, _, value in pairs if value.endswith("kB")}


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


if __name__ == "__main__":
    sys.exit(main())
