"""Starts real training processes through the deepspeed launcher, and the command line as a user does."""

import contextlib
import io
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.ranks import ROOT, environment
from tests.warm import Training
from tidal_dist.cli import main
from tidal_dist.launching import Launch, command_on_this_machine, free_port


@contextlib.contextmanager
def started(
    config: Path, *arguments: str, ranks: int = 2, script: str = "launch/train.py", by_deepspeed: bool = False
) -> Iterator["subprocess.Popen[str] | Training"]:
    """Training while it runs; no process outlives the block.

    by_deepspeed: through `deepspeed --num_gpus RANKS`, as users start it, which takes many seconds more.
    """
    if by_deepspeed:
        command = command_on_this_machine(config, arguments, ranks)
        with Launch(command, subprocess.PIPE, ROOT, environment()) as launched:
            yield launched.process
        return
    training = Training(ROOT / script, ["--config", str(config), *arguments], ranks, free_port(), environment())
    try:
        yield training
    finally:
        training.kill()


def launch(
    config: Path,
    *arguments: str,
    ranks: int = 2,
    timeout: float = 240,
    script: str = "launch/train.py",
    by_deepspeed: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run the training to its end."""
    with started(config, *arguments, ranks=ranks, script=script, by_deepspeed=by_deepspeed) as process:
        output, _ = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def launched(config: Path, *arguments: str, ranks: int = 2, by_deepspeed: bool = False) -> str:
    """Like `launch`, for a run that must succeed; its output."""
    result = launch(config, *arguments, ranks=ranks, by_deepspeed=by_deepspeed)
    assert result.returncode == 0, result.stdout[-3000:]
    return result.stdout


def error_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error:")]


def tidal(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run `tidal ...` with standard input, as a process of its own."""
    command = [sys.executable, "-m", "tidal_dist.cli", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, cwd=ROOT, env=environment(), timeout=300)


def tidal_here(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """The same in this process, which has imported torch already."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = main([str(a) for a in arguments])
    outputs = (stream.buffer.getvalue() for stream in (out, err))  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(arguments, code, *outputs)


def tidal_error(*arguments: str | Path, stdin: bytes = b"") -> str:
    """Run a command that must fail with one clear line, the last, and nothing on standard output; the line."""
    result = tidal_here(*arguments, stdin=stdin)
    output = result.stderr.decode()
    assert result.returncode == 2, result
    assert result.stdout == b""
    assert len(error_lines(output)) == 1, output
    assert output.splitlines()[-1].startswith("error: ")
    return output.splitlines()[-1]


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process, and of those it starts meanwhile, can grow beyond `size` bytes: a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """TensorBoard scalars of a run: name -> step -> value."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def images(run: Path) -> dict[str, dict[int, bytes]]:
    """TensorBoard images of a run: name -> step -> PNG."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return {tag: {e.step: e.encoded_image_string for e in events.Images(tag)} for tag in events.Tags()["images"]}


def write_config(folder: Path, **sections: dict) -> Path:
    """A complete configuration of a tiny run on sums, with `folder` for everything."""
    content: dict = {
        "run_dir": str(folder / "run"),
        "corpus": {"sources": [{"path": str(folder / "corpus.jsonl"), "format": "jsonl"}], "validation_fraction": 0.1},
        "tokenizer": {"vocab_size": 270, "sample_bytes": 10_000},
        "data": {
            "shards": str(folder / "shards"),
            "row_tokens": 48,
            "row_chars": 40,
            "lanes": 4,
            "workers": 0,
            "shard_bytes": 5000,
        },
        "model": {"n_layers": 2, "width": 32, "n_heads": 2},
        "training": {
            "steps": 6,
            "batch_rows": 8,
            "learning_rate": 3e-3,
            "warmup_steps": 2,
            "log_every_steps": 1,
            "save_every_steps": 3,
        },
        "validation": {"every_steps": 3, "rows": 8, "prompts": 3, "max_bytes": 8},
        "monitor": {"pictures": False, "report": False},  # which take seconds each
    }
    for section, values in sections.items():
        content[section] = content.get(section, {}) | values
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def prepare_sums(folder: Path, count: int = 1500) -> Path:
    """A configuration whose shards are prepared."""
    from data_pipeline.arithmetic import write_corpus

    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(folder / "corpus.jsonl", count, seed=1)
    config = write_config(folder)
    result = tidal_here("prepare", config, "--json")
    assert result.returncode == 0, result.stderr.decode()
    assert json.loads(result.stdout)["splits"]["train"]["rows"] > 40
    return config
