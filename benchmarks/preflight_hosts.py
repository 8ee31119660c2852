"""How long `tidal preflight` takes over many hosts, which are played: `python -m benchmarks.preflight_hosts`.

The hosts answer after so many seconds as real ones take: the defaults were measured on two hosts with two cores
between them, connecting rounded up for a network. What is measured is how many are asked side by side, and what the
asking host does with the answers; ssh's own work on it, some 30 ms of a core a connection, is not in it.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.launching import write_config
from tests.played_hosts import Played, hostfile_text
from tidal_dist.cluster.job import Request
from tidal_dist.cluster.placement import on_hosts
from tidal_dist.cluster.preflight.report import as_text
from tidal_dist.cluster.preflight.run import preflight
from tidal_dist.cluster.transport import AT_ONCE
from tidal_dist.config import load_config


def main() -> None:
    """Measure, and print the table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=256)
    parser.add_argument("--at-once", type=int, default=AT_ONCE)
    parser.add_argument("--connect", type=float, default=0.5, metavar="SECONDS", help="of ssh (default: 0.5)")
    parser.add_argument("--look", type=float, default=5.0, metavar="SECONDS", help="of a probe (default: 5)")
    parser.add_argument("--reach", type=float, default=1.0, metavar="SECONDS", help="of a meeting (default: 1)")
    arguments = parser.parse_args()
    connect = arguments.connect
    played = Played(
        gpus=8,
        seconds={
            **dict.fromkeys(("clock", "find", "forget", "addresses"), connect),
            "look": connect + arguments.look,
            **dict.fromkeys(("listen", "reach"), connect + arguments.reach),
        },
    )
    with TemporaryDirectory() as name:
        folder, ranks = Path(name), 8 * arguments.hosts
        config = write_config(folder, data={"lanes": ranks}, training={"batch_rows": ranks})
        (folder / "hostfile").write_text(hostfile_text(arguments.hosts, 8))
        placement = on_hosts(folder / "hostfile", "", "", ())
        request = Request(str(config), load_config(config), [], placement)
        began = time.monotonic()
        report = preflight(request, played, sample=8, together=False, at_once=arguments.at_once, progress=print)
        seconds = time.monotonic() - began
    print(as_text(report))
    print(json.dumps({"hosts": arguments.hosts, "at_once": played.most, "seconds": round(seconds, 1), "go": report.go}))


if __name__ == "__main__":
    main()
