"""One job, or the corpus that jobs share, in a process of its own: `python -m experiments.work data|job FOLDER`.

What is done is not done again: a corpus that is prepared, a run's checkpoints, a run that has finished. Where it leads
a process group, that ends with whoever started it, whose end it sees on its standard input.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from data_pipeline.errors import one_line
from data_pipeline.files import replace_file
from experiments.places import CONFIG, CORPUS, DATA, RUN, TESTS, TRAIN
from experiments.results import Curve, JobFile, Key, Result, as_bytes, read_job, write_result
from experiments.spec import Metric
from tidal_dist import launching
from tidal_dist.config import load_config
from tidal_dist.errors import UserError
from tidal_dist.history.events import read_events
from tidal_dist.history.scalars import curve, read_scalars
from tidal_dist.training.commit import complete_checkpoints


def main(arguments: Sequence[str]) -> int:
    """Do it; 2 for an error the user can mend, 1 where the training failed."""
    what, folder = arguments[0], Path(arguments[1])
    if os.getpgrp() == os.getpid():  # not where a person starts it by hand
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        {"data": prepare_data, "job": do_job}[what](folder)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: the training ended with exit code {error.returncode}", file=sys.stderr, flush=True)
        return 1
    return 0


def _end_with_parent() -> None:
    """Wait until standard input ends, then kill this process and what it has started."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def prepare_data(folder: Path) -> None:
    """The corpus of the job in a folder: written by its task, then prepared as `tidal prepare` does.

    Raises:
        UserError: the task's options are wrong, or the corpus cannot be prepared.
    """
    from data_pipeline.prepare import prepare
    from data_pipeline.rows import read_row_plan, row_format_of
    from experiments.tasks import TASKS

    job, config = read_job(folder), load_config(folder / CONFIG)
    target = Path(job.data)
    if not (target / CORPUS / TRAIN).exists():
        TASKS[job.task].write(target / CORPUS, job.options, job.seed)
    manifest = prepare(
        config.corpus,
        config.tokenizer,
        config.segmentation,
        config.data,
        config.to_yaml(),
        overwrite=True,  # of an earlier start that was killed before it said so in data.json
        engine=config.prepare,
    )
    lines = (target / CORPUS / TRAIN).read_bytes().splitlines()
    content = {
        "documents": sum(shard["documents"] for shard in manifest.shards("train")),
        "rows": sum(plan["rows"] for plan in read_row_plan(manifest, row_format_of(config.data))["train"]),
        "distinct": len(set(lines)),
    }
    replace_file(target / DATA, as_bytes(content))


def do_job(folder: Path) -> None:
    """Train, evaluate, and let the result appear.

    Raises:
        UserError: what is there does not fit. subprocess.CalledProcessError: the training failed.
    """
    from experiments.evaluate import evaluate, open_trained
    from experiments.samples import samples
    from tidal_dist.bench.machine import describe_machine

    job, started = read_job(folder), time.time()
    run = folder / RUN
    _train(folder)
    trained = time.time()
    tests, knows = _tests(Path(job.data) / CORPUS / TESTS), open_trained(run)
    figures = evaluate(knows, tests)
    texts = [document for documents in tests.values() for document in documents[:1] if not document[0]]
    written = samples(knows, texts) if texts else []
    device = "cuda" if _has_gpu() else "cpu"
    made = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "training_seconds": round(trained - started, 1),
        "evaluation_seconds": round(time.time() - trained, 1),
        "machine": describe_machine(device),
    }
    key = Key(**job.key)  # type: ignore[arg-type]
    write_result(folder, Result(key, figures, _curves(run), _data(job, folder), made, written))


def _train(folder: Path) -> None:
    run = folder / RUN
    if _has_finished(run):
        return
    command = [sys.executable, str(launching.TRAIN), "--config", str(folder / CONFIG)]
    if complete_checkpoints(run / "checkpoints"):
        command.append("--resume")
    # A signal to stop goes to the whole group: the training saves a checkpoint, and this process waits for it.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGTERM, before)
    if not _has_finished(run):
        raise UserError(f"{run}: the training was stopped before its end; start again to go on")


def _has_finished(run: Path) -> bool:
    return [event["event"] for event in read_events(run)][-1:] == ["finish"]


def _tests(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Prompts with their answers, of each test by its name; of a text the prompt is empty."""
    return {
        path.stem: [_sample(line) for line in path.open(encoding="utf-8")] for path in sorted(folder.glob("*.jsonl"))
    }


def _sample(line: str) -> tuple[str, str]:
    fields = json.loads(line)
    return (fields["prompt"], fields["answer"]) if "prompt" in fields else ("", fields["text"])


def _curves(run: Path) -> dict[str, Curve]:
    scalars = read_scalars(run)
    found = {metric: curve(scalars, f"validation/{metric}") for metric in get_args(Metric)}
    return {metric: list(zip(*points, strict=True)) for metric, points in found.items() if points[0]}


def _data(job: JobFile, folder: Path) -> dict[str, float]:
    content: dict[str, Any] = json.loads((Path(job.data) / DATA).read_bytes())
    rows = load_config(folder / CONFIG).training.batch_rows
    per_step = rows * content["documents"] / content["rows"]
    return {"documents": content["documents"], "distinct": content["distinct"], "documents_per_step": per_step}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
