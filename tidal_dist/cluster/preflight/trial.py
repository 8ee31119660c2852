"""Starts on all hosts, as training is started, what launch/preflight.py measures; rows of what came out."""

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from tidal_dist.cluster.attempt import TOO_LONG, stop_signals_wait
from tidal_dist.cluster.job import FOLDER as LAUNCH
from tidal_dist.cluster.job import OUTPUT, Job, Request
from tidal_dist.cluster.preflight.rows import EVERYWHERE, Row, gigabytes
from tidal_dist.cluster.transport import Transport
from tidal_dist.errors import UserError
from tidal_dist.launching import TRAIN

MARK = "preflight found "
FOLDER = ".preflight"  # in the run folder, while it lasts
SCRIPT = TRAIN.with_name("preflight.py")
_LIMIT_SECONDS = 180.0
_WAIT_MINUTES = 1.0  # of a rank for the others
_SLOW = 0.5  # of what the others reach


def attempt(request: Request, transport: Transport) -> tuple[dict[str, Any] | None, list[Row]]:
    """What the ranks measured, if they did; rows about it."""
    run = Path(request.config.run_dir)
    own = [f"run_dir={run / FOLDER}", f"training.collective_timeout_minutes={_WAIT_MINUTES}"]
    request = replace(
        request,
        config=request.config.model_copy(update={"run_dir": str(run / FOLDER)}),
        overrides=[*request.overrides, *own],
        script=SCRIPT,
        limit_seconds=_LIMIT_SECONDS,
    )
    with _left_as_it_was(run):
        try:
            code, said = _started(request, transport)
        except UserError as error:
            return None, [Row(EVERYWHERE, "network", "fail", str(error), "see `--master-addr`, `--master-port`")]
        output = (run / FOLDER / LAUNCH / OUTPUT).read_text("utf-8", "replace")
    for line in output.splitlines():
        if MARK in line:
            found = json.loads(line.partition(MARK)[2])
            return found, list(rows(found))
    return None, [
        Row(EVERYWHERE, "collective", "fail", _why(code, said, output), "see docs/survival.md: tidal diagnose")
    ]


def _started(request: Request, transport: Transport) -> tuple[int, str]:
    """The launcher's exit code, and what was said about it.

    Raises:
        UserError: the hosts do not reach each other, or the launcher cannot be started.
    """
    said = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    with stop_signals_wait():
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            attempt = Job(request, transport).start(False)
            code = attempt.run()
        if attempt.requested:
            raise KeyboardInterrupt
        return code, said.buffer.getvalue().decode(errors="replace")


@contextlib.contextmanager
def _left_as_it_was(run: Path) -> Iterator[None]:
    """Nothing is left in the run folder, nor that itself where there was none."""
    missing = [path for path in (run, *run.parents) if not path.exists()]
    try:
        yield
    finally:
        shutil.rmtree(run / FOLDER, ignore_errors=True)
        with contextlib.suppress(OSError):
            for path in missing:
                path.rmdir()


def _why(code: int, said: str, output: str) -> str:
    if code == TOO_LONG:
        return f"not done after {_LIMIT_SECONDS:.0f} s"
    lines = [line.strip() for line in output.splitlines()]
    errors = [line.partition("error: ")[2] for line in lines if "error: " in line and not line.startswith("srun")]
    blamed = [line.removeprefix("supervise: ") for line in said.splitlines() if line.startswith("supervise: rank ")]
    return "; ".join([*blamed[:1], *errors[:1]]) or f"ended with code {code} ({(lines or ['no output'])[-1]})"


def rows(found: dict[str, Any]) -> Iterator[Row]:
    """Of what the ranks measured."""
    ranks, size = found["ranks"], gigabytes(found["message_bytes"])
    if "pairs" in found:
        text = f"all-reduce {found['all_reduce_gb_per_second']:.2f} GB/s, all-gather "
        text += f"{found['all_gather_gb_per_second']:.2f} GB/s ({found['backend']}, {ranks} ranks, {size} each)"
        yield Row(EVERYWHERE, "collective", "ok", text)
        yield from _pair_rows(found["pairs"])
    saved = found["checkpoint"]
    if saved["problem"]:
        remedy = "look at the file system of the run folder; docs/survival.md says what it must be able to do"
        yield Row(EVERYWHERE, "checkpoint", "fail", saved["problem"], remedy)
    else:
        rate = saved["bytes"] / saved["seconds"]
        text = f"{gigabytes(saved['bytes'])} of {ranks} ranks written in {saved['seconds']:.1f} s ({gigabytes(rate)}/s)"
        yield Row(EVERYWHERE, "checkpoint", "ok", f"{text} and read back")


def _pair_rows(pairs: dict[str, Any]) -> Iterator[Row]:
    usual, (slowest, *_) = pairs["median_gb_per_second"], pairs["slowest"]
    text = f"pairs: {pairs['count']}, {usual:.2f} GB/s each way in the middle; slowest "
    text += f"{' - '.join(slowest['pair'])} with {slowest['gb_per_second']:.2f} GB/s"
    remedy = "look at its cable, switch port and network card (ethtool, ibstat)"
    if slowest["gb_per_second"] < _SLOW * usual:
        yield Row(
            EVERYWHERE, "pairs", "warn", text, "if one host is slow with all others, it is below; else the switch"
        )
    else:
        yield Row(EVERYWHERE, "pairs", "ok", text)
    by_host = pairs["median_by_host"]
    for host, speed in by_host.items():
        others = median(other for name, other in by_host.items() if name != host)
        if speed < _SLOW * others:
            yield Row(host, "pairs", "warn", f"{speed:.2f} GB/s with the others, which have {others:.2f} GB/s", remedy)
