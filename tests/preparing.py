"""A corpus of several files whose preparation has many tasks, and what tests look at in its folders."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.corpus import CorpusConfig, SourceConfig
from data_pipeline.errors import UserError
from data_pipeline.prepare import Prepared, Request, run
from data_pipeline.preparing.executors import PrepareConfig
from data_pipeline.segmentation import SegmentationConfig
from data_pipeline.shards import DataConfig
from data_pipeline.tokenizer import TokenizerConfig
from tests.launching import ROOT, environment, write_config

FILES = 4


def write_texts(folder: Path, files: int = FILES, lines: int = 60) -> Path:
    """JSON lines in `files` files of about 4 kB."""
    folder.mkdir(parents=True, exist_ok=True)
    for f in range(files):
        records = [{"text": f"{f}: line {i} says that {i} and {f} make {i + f}, no more."} for i in range(lines)]
        (folder / f"{f}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def request_for(folder: Path, corpus: CorpusConfig | None = None, **changes: Any) -> Request:
    """Shards in `folder`/shards of the files in `folder`/texts, a file a task. `changes` of the request or engine."""
    corpus = corpus or CorpusConfig(
        sources=[SourceConfig(path=str(folder / "texts"), format="jsonl")], validation_fraction=0.2
    )
    engine = {"task_bytes": 1000, "workers": 1} | {k: changes.pop(k) for k in ("task_bytes", "workers") if k in changes}
    return Request(
        **{
            "corpus": corpus,
            "tokenizer": TokenizerConfig(vocab_size=300, sample_bytes=10_000),
            "segmentation": SegmentationConfig(),
            "data": DataConfig(shards=str(folder / "shards"), row_tokens=48, row_chars=96, shard_bytes=3000),
            "resolved_config": "resolved: true\n",
            "engine": PrepareConfig(**engine),
        }
        | changes
    )


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file of a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def fails(request: Request, kind: type[UserError] = UserError) -> str:
    """The one line with which a preparation fails."""
    with pytest.raises(kind) as caught:
        run(request)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def redone(prepared: Prepared) -> dict[str, int]:
    """Of each stage that did anything, the tasks that were done, not kept."""
    return {name: tasks["done"] for name, tasks in prepared.tasks.items() if tasks["done"]}


def config_file(folder: Path, **sections: dict[str, Any]) -> Path:
    """The same preparation as a configuration file."""
    own: dict[str, dict[str, Any]] = {
        "corpus": {"sources": [{"path": str(folder / "texts"), "format": "jsonl"}]},
        "data": {"shard_bytes": 3000, "row_tokens": 48, "row_chars": 96},
        "prepare": {"task_bytes": 1000, "workers": 1},
    }
    return write_config(folder, **{name: own.get(name, {}) | sections.get(name, {}) for name in own | sections})


def start_prepare(config: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """`tidal prepare CONFIG` with options and overrides, as a process group of its own."""
    options = [a for a in arguments if a.startswith("--")]
    overrides = [a for a in arguments if not a.startswith("--")]
    return subprocess.Popen(
        [sys.executable, "-m", "tidal_dist.cli", "prepare", "--json", *options, str(config), *overrides],
        cwd=ROOT,
        env=environment() | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL a process, and wait until those that it started are gone by themselves."""
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 20
    while group_is_alive(process.pid):
        assert time.monotonic() < deadline, "what it started goes on"
        time.sleep(0.02)


def group_is_alive(group: int) -> bool:
    """Whether there is a process of a process group."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def lines_of(stderr: str) -> Sequence[str]:
    """Lines of standard error that are no progress."""
    return [line for line in stderr.splitlines() if " tasks" not in line]
