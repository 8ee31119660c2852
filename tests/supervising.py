"""A launcher that is played: what it does at each start stands in a file, one line a start. Run as a script."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tidal_dist.history.events import Events

STEPS = 6


def complete_checkpoint(run: Path, step: int) -> None:
    """A checkpoint as far as its being complete is concerned."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text("{}")
    (folder / "COMMIT").write_text(json.dumps({"format": 1, "step": step, "files": []}))


def _rank(run: Path, patience: int) -> int:
    """A rank that saves and stops at the first signal, or ends at the second where it is stuck."""
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    (run / "pid").write_text(str(os.getpid()))
    for _ in range(patience):
        received = signal.sigwait(signals)
        print("heard", signal.Signals(received).name, flush=True)
    if patience > 1:
        return 128 + received
    complete_checkpoint(run, 4)
    Events(run, True).add("stop", 4, reason=signal.Signals(received).name)
    return 0


def main() -> int:
    """What the next line says."""
    config_file = sys.argv[sys.argv.index("--config") + 1]
    run = Path(yaml.safe_load(Path(config_file).read_text())["run_dir"])
    if sys.argv[1] == "rank":
        return _rank(run, int(sys.argv[2]))
    run.mkdir(exist_ok=True)
    if os.environ.get("SLURM_NODEID", "0") != "0":
        time.sleep(0.5)  # the first node plays for all
        return 0
    plan, log = run.parent / "plan", run.parent / "starts"
    action, *later = plan.read_text().splitlines()
    plan.write_text("\n".join(later))
    with open(log, "a") as file:
        file.write(" ".join(sys.argv[1:]) + "\n")
    match action.split():
        case ["crash", *step]:
            if step:
                complete_checkpoint(run, int(step[0]))
            return 1
        case ["finish"]:
            complete_checkpoint(run, STEPS)
            Events(run, True).add("finish", STEPS)
            return 0
        case ["exit", code]:
            return int(code)
        case ["train", patience]:
            command = [sys.executable, __file__, "rank", patience, "--config", config_file]
            return subprocess.run(command, env=os.environ | {"LOCAL_RANK": "0"}).returncode
    raise ValueError(action)


if __name__ == "__main__":
    sys.exit(main())
