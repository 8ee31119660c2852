"""What a rehearsal found: parts with their seconds, checks with what was expected and found, go or no-go."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """One comparison. `holds`: none: it could not be made, which is no reason against the job."""

    what: str
    expected: str
    found: str
    holds: bool | None

    @property
    def mark(self) -> str:
        """In the table."""
        return {True: "ok", False: "FAILS", None: "-"}[self.holds]


@dataclass
class Report:
    """A rehearsal, while it goes on and at its end.

    Attributes:
        seed: of what is random in it. ranks: of the undisturbed run. folder: where it ran, if that was kept.
        parts: seconds by part. failed: why a part did not come to its end, by part; those that need it were not begun.
    """

    seed: int
    ranks: int
    folder: str | None = None
    parts: dict[str, float] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def go(self) -> bool:
        """Whether the job can be started."""
        return not self.failed and all(check.holds is not False for check in self.checks)

    def add(self, what: str, expected: str, found: str, holds: bool | None) -> None:
        """Note a comparison."""
        self.checks.append(Check(what, expected, found, holds))

    def as_object(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self) | {"go": self.go}

    def as_text(self) -> str:
        """As a table."""
        rows = [(c.what, c.expected, c.found, c.mark) for c in self.checks]
        table = _table([("compared", "expected", "found", ""), *rows])
        seconds = ", ".join(f"{name} {value:.0f}" for name, value in self.parts.items())
        lines = [*table, "", f"{self.ranks} ranks, seed {self.seed}; seconds: {seconds}"]
        lines += [f"{part} did not come to its end: {why}" for part, why in self.failed.items()]
        if self.folder:
            lines.append(f"logs and checkpoints are in {self.folder}")
        return "\n".join([*lines, "GO" if self.go else "NO-GO"])


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths if width), *lines[1:]]
