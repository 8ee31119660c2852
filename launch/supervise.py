"""Start training and see that it goes on: `python -m launch.supervise --config CONFIG --num_gpus 8 -- [overrides]`.

Resumes after a crash, and hands SIGTERM, SIGUSR1 and SIGINT on to the ranks, which save and stop. The deepspeed
launcher does neither: it dies of SIGUSR1 and leaves its ranks behind; of SIGTERM, which it gives to one rank after the
other, each has half a minute. So it runs in a session of its own, where these signals are blocked: it never sees them,
and its ranks, which take them from their first moment on, cannot lose one. Unknown arguments go to the launcher.

`python -m launch.supervise --run COMMAND...` does this alone, once, for a command that starts ranks: for each node of a
job. Variables such as `$SLURM_NODEID` in the command are those of the node.
"""

import signal

if __name__ == "__main__":
    # Before the imports take their second: what srun hands on meanwhile must wait, and not end the node's task.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import UserError
from tidal_dist.cluster.attempt import Attempt, Ranks, RanksHere, RanksOfSrun, stop_signals_wait
from tidal_dist.cluster.supervisor import UNFINISHED, USER_ERROR, is_finished, newest_step, run_once, supervise
from tidal_dist.config import load_config
from tidal_dist.training.interrupts import JOB_STARTED

_TRAIN = Path(__file__).parent / "train.py"


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
        "--once",
        action="store_true",
        help="start no second time; 3 where the run is not finished: for what itself starts jobs again, as Kubernetes",
    )
    arguments.add_argument(
        "--status", action="store_true", help="only print the newest checkpoint's step; 0 if the run is finished, or 3"
    )
    return arguments


@stop_signals_wait()
def main(argv: Sequence[str] | None = None) -> int:
    """Supervise; 0 when the run is finished or was stopped on request, 2 for an error the user can mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["--run"]:
            return Attempt([os.path.expandvars(word) for word in argv[1:]], RanksHere()).run()
        known, overrides = _split(argv)
        arguments, launcher_arguments = parser().parse_known_args(known)
        config = load_config(arguments.config, overrides)
        if arguments.status:
            print(newest_step(config) or 0)
            return 0 if is_finished(config) else UNFINISHED
        command = shlex.split(arguments.launcher_command or str(Path(sys.executable).parent / "deepspeed"))
        command += [*launcher_arguments, str(_TRAIN), "--config", arguments.config]
        started = {JOB_STARTED: os.environ.get(JOB_STARTED, str(time.time()))}

        def start(resume: bool) -> Attempt:
            ranks: Ranks = RanksOfSrun() if arguments.signal_srun else RanksHere()
            return Attempt([*command, *(["--resume"] if resume else []), *overrides], ranks, started)

        if arguments.once:
            return run_once(config, start)
        return supervise(config, start, arguments.max_restarts, arguments.pause)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return USER_ERROR


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments before and after `--`."""
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


if __name__ == "__main__":
    sys.exit(main())
