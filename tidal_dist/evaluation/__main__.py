"""lm-evaluation-harness with this model in it: `python -m tidal_dist.evaluation --model tidal ...`.

The same as the command `lm_eval`, whose releases up to 0.4.13 do not look for models in other packages.
"""

import sys
from importlib import import_module
from importlib.util import find_spec

from tidal_dist.errors import UserError


def main() -> int:
    """Run the harness with the arguments of the command line; 2 where the user has to mend something."""
    try:
        if find_spec("lm_eval") is None:
            raise UserError("no lm-evaluation-harness; install it with pip install 'tidal-dist[eval]'")
        from lm_eval.__main__ import cli_evaluate

        import_module("tidal_dist.evaluation.harness")  # makes it known as `tidal`
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
