"""RUN/events.jsonl: what a person would want to know of a run's life, one JSON line each."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"


class Events:
    """Appends to the events of a run. `writes`: whether this rank does; the others keep silent."""

    def __init__(self, run: Path, writes: bool):
        self._path, self._writes = run / EVENTS, writes

    def add(self, event: str, step: int, **details: Any) -> None:
        """Append an event that happened after `step` steps; a full disk loses the line, and nothing else."""
        if not self._writes:
            return
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, "event": event, **details}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as file:
                # The line before may have been cut off by a kill: what follows it must not be lost with it.
                start = "\n" if file.tell() and not _ends_in_newline(self._path) else ""
                file.write(f"{start}{json.dumps(line, ensure_ascii=False, default=str)}\n")
        except OSError:
            pass


def _ends_in_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def read_events(run: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; [] where there are none. Lines that were cut off are not there."""
    try:
        lines = (run / EVENTS).read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [event for line in lines if (event := _parsed(line)) is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and {"time", "step", "event"} <= event.keys() else None
