"""What a check says of a host: one row of the table. And which host is the odd one out."""

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Status = Literal["ok", "warn", "fail"]
EVERYWHERE = "all hosts"
V = TypeVar("V", bound=Hashable)
Facts = Mapping[str, Mapping[str, Any]]  # of `node.look`, by host


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        host: whose, or `EVERYWHERE`. what: was found. remedy: what to do; "" where all is well.
    """

    host: str
    check: str
    status: Status
    what: str
    remedy: str = ""


def usual(values: Mapping[str, V]) -> V:
    """What most hosts have; among equally many, what the first of these hosts has."""
    return Counter(values.values()).most_common(1)[0][0]


def gigabytes(size: float) -> str:
    """A size for people."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
