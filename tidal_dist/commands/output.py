"""What all commands print, and how they check numbers."""

import argparse
import json
import sys
from typing import Any

from data_pipeline.errors import UserError


def log(text: str) -> None:
    """Write a line of progress to standard error."""
    print(text, file=sys.stderr, flush=True)


def print_report(arguments: argparse.Namespace, report: dict[str, Any], text: str) -> int:
    """Print a command's result, as one JSON object with `--json`, else as text; 0."""
    print(json.dumps(report) if arguments.json else text)
    return 0


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises UserError where an argument is out of bounds."""
    if not low <= value <= high:
        bounds = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise UserError(f"{name} {value:g}: must be {bounds}")
