"""Start training and see that it goes on: `python -m launch.supervise --config CONFIG --num_gpus 8 -- [overrides]`.

Resumes after a crash, and hands SIGTERM, SIGUSR1 and SIGINT on to the ranks, which save and stop. The deepspeed
launcher does neither: it dies of SIGUSR1 and leaves its ranks behind; of SIGTERM, which it gives to one rank after the
other, each has half a minute. So it runs in a session of its own, where these signals are blocked: it never sees them,
and its ranks, which take them from their first moment on, cannot lose one. Unknown arguments go to the launcher.

`python -m launch.supervise --run COMMAND...` does this alone, once, for a command that starts ranks: for each node of a
job. Variables such as `$SLURM_NODEID` in the command are those of the node.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_pipeline.errors import UserError
from tidal_dist import processes
from tidal_dist.config import Config, load_config
from tidal_dist.history.events import read_events
from tidal_dist.training.interrupts import JOB_STARTED, STOP_SIGNALS

_TRAIN = Path(__file__).parent / "train.py"
_USER_ERROR = 2
_UNFINISHED = 3
_TICK_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 300.0
_ORPHANS_SECONDS = 10.0


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    arguments = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    arguments.add_argument("--config", required=True, help="YAML file of the run")
    arguments.add_argument(
        "--max-restarts", type=int, default=10, metavar="N", help="without a new checkpoint (default: 10)"
    )
    arguments.add_argument(
        "--pause", type=float, default=5.0, metavar="SECONDS", help="before the first restart; doubles (default: 5)"
    )
    arguments.add_argument("--launcher-command", help="default: deepspeed, from where this Python is")
    arguments.add_argument(
        "--signal-srun", action="store_true", help="the launcher is srun: it gets SIGUSR1, which it passes on"
    )
    arguments.add_argument(
        "--status", action="store_true", help="only print the newest checkpoint's step; 0 if the run is finished, or 3"
    )
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Supervise; 0 when the run is finished or was stopped on request, 2 for an error the user can mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        if argv[:1] == ["--run"]:
            return Attempt([os.path.expandvars(word) for word in argv[1:]]).run()
        known, overrides = _split(argv)
        arguments, launcher_arguments = parser().parse_known_args(known)
        config = load_config(arguments.config, overrides)
        if arguments.status:
            print(newest_step(config) or 0)
            return 0 if is_finished(config) else _UNFINISHED
        command = shlex.split(arguments.launcher_command or str(Path(sys.executable).parent / "deepspeed"))
        command += [*launcher_arguments, str(_TRAIN), "--config", arguments.config]
        job = Job(config, command, overrides, arguments.signal_srun)
        return _supervise(job, arguments.max_restarts, arguments.pause)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return _USER_ERROR
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments before and after `--`."""
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


@dataclass(frozen=True)
class Job:
    """What is started, again and again.

    Attributes:
        command: the launcher with its arguments, train.py and the configuration. is_srun: see `Attempt`.
    """

    config: Config
    command: list[str]
    overrides: list[str]
    is_srun: bool


def _supervise(job: Job, max_restarts: int, pause: float) -> int:
    started = os.environ.get(JOB_STARTED, str(time.time()))
    restarts = 0
    while True:
        begun, step = time.time(), newest_step(job.config)
        if is_finished(job.config):
            _say(f"{job.config.run_dir} is finished")
            return 0
        attempt = Attempt([*job.command, *(["--resume"] if step else []), *job.overrides], job.is_srun, started)
        code = attempt.run()
        if attempt.requested or code == _USER_ERROR:
            return code
        if code == 0 and (is_finished(job.config) or _has_stopped(job.config, begun)):
            return 0
        restarts = 0 if (newest_step(job.config) or 0) > (step or 0) else restarts + 1
        if restarts > max_restarts:
            _say(f"ended with code {code} after {max_restarts} restarts without a new checkpoint; giving up")
            return code or 1
        seconds = min(pause * 2 ** max(restarts - 1, 0), _LONGEST_PAUSE_SECONDS)
        _say(f"ended with code {code}; starting again in {seconds:g} s ({restarts} without a new checkpoint)")
        if received := _wait_for_signal(seconds):
            _say(f"{received.name}: not starting again")
            return 0


def newest_step(config: Config) -> int | None:
    """The step of the newest complete checkpoint, if there is one."""
    folder = Path(config.run_dir) / "checkpoints"
    if not any(folder.glob("step-*")):
        return None
    from tidal_dist.training.checkpoint import complete_checkpoints  # imports torch

    found = complete_checkpoints(folder)
    return int(found[-1].name.removeprefix("step-")) if found else None


def is_finished(config: Config) -> bool:
    """Whether the run has made all its steps and said so, or has ended early by its own rule."""
    events = [e for e in read_events(Path(config.run_dir)) if e["event"] in ("start", "resume", "stop", "finish")]
    if not events:
        return (newest_step(config) or 0) >= config.training.steps
    last = events[-1]
    return last["event"] == "finish" and (last["step"] >= config.training.steps or bool(last.get("reason")))


def _has_stopped(config: Config, since: float) -> bool:
    """Whether the run was stopped on request: by a signal to one of its ranks, or by its time limit.

    The launcher's exit code alone does not tell: it is 0 also where the launcher itself was killed.
    """
    events = Path(config.run_dir) / "events.jsonl"
    stops = [e for e in read_events(Path(config.run_dir)) if e["event"] in ("start", "resume", "stop", "finish")]
    return bool(stops) and stops[-1]["event"] == "stop" and events.stat().st_mtime >= since - 1


class Attempt:
    """One start of a command that starts ranks, and the signals until it has ended.

    Args:
        is_srun: signals are for the command alone: as SIGUSR1, since srun passes that on, and answers others itself.
        job_started: since when a time limit counts, in wall time; none: as the environment has it.
    """

    def __init__(self, command: list[str], is_srun: bool = False, job_started: str | None = None):
        self._command, self._is_srun = command, is_srun
        self._environment = os.environ | ({JOB_STARTED: job_started} if job_started else {})
        self._signals: list[signal.Signals] = []
        self._heard: dict[int, int] = {}  # how many of the signals each rank has been sent

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return bool(self._signals)

    def run(self) -> int:
        """Start, wait, hand signals on; the command's exit code, as a shell has it.

        Raises:
            UserError: there is no such command.
        """
        _say("$ " + shlex.join(self._command))
        unblock = partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, STOP_SIGNALS) if self._is_srun else None
        try:
            process = subprocess.Popen(
                self._command,
                env=self._environment,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                preexec_fn=unblock,
            )
        except OSError as error:
            raise UserError(f"{self._command[0]}: cannot start ({error.strerror})") from None
        ranks: set[int] = set()
        try:
            while process.poll() is None or (self.requested and self._living(ranks)):
                ranks |= set(self._ranks(process.pid))
                if received := _wait_for_signal(_TICK_SECONDS):
                    self._signals.append(received)
                    _say(f"{received.name}: handed on; " + _PROSPECTS[min(len(self._signals), len(_PROSPECTS)) - 1])
                self._hand_on([process.pid] if self._is_srun else sorted(self._living(ranks)))
                if len(self._signals) >= len(_PROSPECTS):
                    break
        finally:
            self._end_all(process, ranks)
        code = process.wait()
        return code if code >= 0 else 128 - code

    def _hand_on(self, targets: list[int]) -> None:
        for pid in targets:
            for received in self._signals[self._heard.get(pid, 0) :]:
                _send(pid, signal.SIGUSR1 if self._is_srun else received)
            self._heard[pid] = len(self._signals)

    def _ranks(self, launcher: int) -> list[int]:
        """The ranks on this host: the topmost processes below the launcher that have a local rank."""
        ranks = [
            p for p in processes.below(launcher, recursive=True) if processes.variable(p, "LOCAL_RANK") is not None
        ]
        inner = {child.pid for rank in ranks for child in processes.below(rank.pid)}
        return [rank.pid for rank in ranks if rank.pid not in inner]

    @staticmethod
    def _living(ranks: set[int]) -> set[int]:
        return {pid for pid in ranks if processes.state(pid)}

    def _end_all(self, process: "subprocess.Popen[bytes]", ranks: set[int]) -> None:
        """Leave no process behind: what the launcher should have ended is given some time, then killed."""
        deadline = time.monotonic() + (_ORPHANS_SECONDS if len(self._signals) < len(_PROSPECTS) else 0.0)
        while self._living(ranks) and time.monotonic() < deadline:
            time.sleep(_TICK_SECONDS)
        for pid in self._living(ranks):
            _send(pid, signal.SIGKILL)
        if process.poll() is None:
            for child in processes.below(process.pid, recursive=True):
                _send(child.pid, signal.SIGKILL)
            process.kill()


_PROSPECTS = (
    "the ranks save and stop; a second one ends them at once",
    "the ranks end at once; a third one kills everything",
    "killing everything",
)


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(pid, number)


def _wait_for_signal(seconds: float) -> signal.Signals | None:
    received = signal.sigtimedwait(STOP_SIGNALS, seconds)
    return None if received is None else signal.Signals(received.si_signo)


def _say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
