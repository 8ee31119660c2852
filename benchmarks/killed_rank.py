"""How long a job on two hosts stands still when a rank is killed: `python -m benchmarks.killed_rank`, as root.

Two hosts made of namespaces, on which `tidal launch` trains the demo's model over pdsh, a rank on each. The rank on the
first host is halted, as if it hung in a collective of NCCL that does not notice that another rank is gone; the one on
the second is killed. Then the seconds until all processes of the launch are down on both hosts, and until the first
step after the automatic restart.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from data_pipeline.arithmetic import write_corpus
from tests.hosts.cluster import two_hosts
from tests.hosts.launches import launch
from tests.hosts.namespaces import obstacle
from tidal_dist.bench.machine import describe_machine

_PROBLEMS = 20_000
_SAVED, _KILLED = 4, 6  # steps


def main() -> int:
    """Measure, and print one JSON line; 2 where there can be no hosts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"), help="default: %(default)s")
    parser.add_argument("--times", type=int, default=3, help="default: %(default)s")
    arguments = parser.parse_args()
    if problem := obstacle():
        print(f"error: {problem}", file=sys.stderr)
        return 2
    with TemporaryDirectory() as name:
        folder = Path(name)
        shards = _prepared(folder, arguments.config)
        found = [_measure(folder / str(n), arguments.config, shards) for n in range(arguments.times)]
    print(json.dumps({"machine": describe_machine(), "seconds": found}))
    return 0


def _prepared(folder: Path, config: Path) -> list[str]:
    """Overrides that name sums which have been prepared."""
    write_corpus(folder / "corpus.jsonl", _PROBLEMS, seed=1)
    shards = [f"corpus.sources=[{{path: {folder}/corpus.jsonl, format: jsonl}}]", f"data.shards={folder}/shards"]
    command = [sys.executable, "-m", "tidal_dist.cli", "prepare", str(config), *shards]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return shards


def _measure(folder: Path, config: Path, shards: list[str]) -> dict[str, float]:
    folder.mkdir()
    overrides = [*shards, f"training.save_every_steps={_SAVED}", "validation.every_steps=1000"]
    with two_hosts(folder / "hosts") as cluster, launch(cluster, config, folder / "run", *overrides) as two:
        first, second = cluster.hosts
        two.wait_for("some steps", lambda: two.beat(1)["step"] >= _KILLED)
        started = two.beat(0)["started"]
        two.ranks(first)[0].suspend()
        two.ranks(second)[0].kill()
        killed = time.monotonic()
        two.wait_for("all down", two.are_down)
        down = time.monotonic() - killed
        two.wait_for("a next step", lambda: two.beat(0)["started"] != started and two.beat(0)["step"] > _SAVED)
        return {"all down": round(down, 1), "next step": round(time.monotonic() - killed, 1)}


if __name__ == "__main__":
    sys.exit(main())
