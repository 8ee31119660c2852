"""What an export takes in memory hardly grows with the model."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import write_small_run
from tests.ranks import ROOT, environment
from tidal_dist.training.checkpoint import load_state

pytestmark = pytest.mark.slow

# Pieces and what is given back at a time are as small beside these models as they are beside large ones.
EXPORT = """
import sys
from tidal_dist.export import proof, weights
from tidal_dist.cli import main
weights._PIECE, proof._RELEASE_BYTES = 1 << 16, 1 << 21
assert main(["export", *sys.argv[1:]]) == 0
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak(folder: Path, layers: int) -> tuple[int, int]:
    """Bytes of the weights of a model, and the most that the process which exported it has had in memory."""
    checkpoint = write_small_run(folder / "run", ranks=4, n_layers=layers, width=192)
    sizes = [parameter["shape"] for parameter in load_state(checkpoint).parameters.values()]
    command = [sys.executable, "-c", EXPORT, str(checkpoint), str(folder / "out")]
    result = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment(), timeout=120, text=True)
    assert result.returncode == 0, result.stderr
    elements = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in sizes)
    return 4 * elements, 1024 * int(result.stdout.splitlines()[-1])


def test_memory_against_the_size_of_the_model(tmp_path: Path) -> None:
    """A process that held the weights once would need a byte more for each; copies of them, several."""
    (small, first), (large, second) = peak(tmp_path / "small", 2), peak(tmp_path / "large", 26)
    assert large - small > 40e6
    assert (second - first) / (large - small) < 0.25
