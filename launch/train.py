"""What the deepspeed launcher starts on every rank: `deepspeed launch/train.py --config configs/demo.yaml`."""

import argparse
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from data_pipeline.errors import UserError
from tidal_dist.cluster.discovery import discover
from tidal_dist.cluster.logs import keep_log
from tidal_dist.training.interrupts import Interrupts, LostRanks

_LET_RANK_0_SPEAK_SECONDS = 4.0


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--config", required=True, help="YAML file of the run")
    arguments.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint")
    arguments.add_argument("--local_rank", type=int, help="set by the launcher")
    arguments.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the configuration")
    return arguments


def main() -> int:
    """Train; 0 also after a stop on request, 1 if ranks were lost, 2 for an error the user can mend."""
    arguments = parser().parse_args()
    interrupts = Interrupts()
    interrupts.listen()
    with ExitStack() as at_end:
        try:
            from tidal_dist.config import load_config

            config = load_config(arguments.config, arguments.overrides)
            discover(Path(config.run_dir))
            at_end.callback(keep_log(Path(config.run_dir)))
            from tidal_dist.training.start import train

            train(config, arguments.resume, interrupts)
            if config.monitor.report and os.environ.get("RANK", "0") == "0":
                _report_if_finished(Path(config.run_dir))
        except (UserError, LostRanks) as error:
            if os.environ.get("RANK", "0") != "0":
                # Most mistakes meet every rank alike: rank 0 names them and the launcher ends the others meanwhile.
                time.sleep(_LET_RANK_0_SPEAK_SECONDS)
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            return 2 if isinstance(error, UserError) else 1
    return 0


def _report_if_finished(run: Path) -> None:
    from tidal_dist.history.events import read_events
    from tidal_dist.run_report.page import write_report

    if [event["event"] for event in read_events(run)][-1:] != ["finish"]:
        return
    try:
        write_report(run, run / "report.html")
    except Exception as error:  # of whatever kind: a run of weeks must not fail because of a page
        print(f"no report: {error!r}; try `tidal report {run}`", file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: one of gloo's threads may still be releasing the tensors of the last collective, which takes the
    # interpreter's lock; if the interpreter is shutting down, that aborts a process whose work is done.
    os._exit(exit_code)
