"""What `tidal preflight` has a launcher start on every rank, as launch/train.py would be: what ranks do together."""

import argparse
import json
import os
import sys
from pathlib import Path

from data_pipeline.errors import UserError
from tidal_dist.cluster.discovery import discover
from tidal_dist.cluster.preflight.trial import MARK
from tidal_dist.training.interrupts import LostRanks


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--config", required=True, help="YAML file of the run")
    arguments.add_argument("--local_rank", type=int, help="set by the launcher")
    arguments.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the configuration")
    return arguments


def main() -> int:
    """Measure, and have rank 0 print it; 1 if ranks were lost, 2 for an error the user can mend."""
    arguments = parser().parse_args()
    try:
        from tidal_dist.cluster.preflight.collective import measure
        from tidal_dist.config import load_config
        from tidal_dist.training import engine

        config = load_config(arguments.config, arguments.overrides)
        discover(Path(config.run_dir))
        with engine.process_group(config.training, Path(config.run_dir)) as (rank, _):
            found = measure(Path(config.run_dir), engine.device())
            if rank == 0:
                print(MARK + json.dumps(found), flush=True)
    except (UserError, LostRanks) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # As launch/train.py: a thread of gloo may still hold tensors.
    os._exit(exit_code)
