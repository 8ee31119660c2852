"""Works at a job as `tests/experimenting.py` does, but the training kills whoever runs the experiments, and waits.

The job's process starts the training with this file in the place of launch/train.py.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

import psutil

from experiments import work
from tests import experimenting
from tidal_dist.history.json_lines import StepLines
from tidal_dist.launching import TRAIN
from tidal_dist.training.commit import complete_checkpoints

_add = StepLines.add


def add_and_die(self: StepLines, step: int, content: dict) -> None:
    _add(self, step, content)
    if step == 5:
        assert complete_checkpoints(self._path.parent / "checkpoints")
        runner = psutil.Process(os.getppid()).ppid()
        os.kill(runner, signal.SIGKILL)
        while True:
            time.sleep(1.0)  # until the job's process, which loses its standard input, ends its group


if __name__ == "__main__":
    if sys.argv[1] == "--config":
        StepLines.add = add_and_die  # type: ignore[method-assign]
        sys.path[0] = str(TRAIN.parent)
        runpy.run_path(str(TRAIN), run_name="__main__")
    else:
        work.launching.TRAIN = Path(__file__)
        sys.exit(experimenting.main(*sys.argv[1:]))
