"""What the folder of a run says of it, whether it is still running, has ended or was killed."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.quarantine import QUARANTINE
from tidal_dist.config import Config
from tidal_dist.history.events import read_events
from tidal_dist.history.generations import Generations, read_generations
from tidal_dist.history.log import Line, read_log
from tidal_dist.history.past import run_config
from tidal_dist.history.scalars import Scalars, curve, read_scalars
from tidal_dist.training import checkpoint as ckpt
from tidal_dist.training.commit import complete_checkpoints

# What time is spent on, and how that is named for people.
TIMES = {
    "forward": "forward pass",
    "backward": "backward pass",
    "optimizer": "optimizer",
    "agree": "waiting for other processes",
    "data": "waiting for data",
    "other": "between these",
    "validation": "validation",
    "checkpoint": "saving checkpoints",
}
_BETTER = {"validation/exact_match": max, "validation/next_block_match": max}  # of all others less is better


@dataclass(frozen=True)
class Kept:
    """A checkpoint of the run. `marks`: what it is the best by."""

    step: int
    bytes: int
    metrics: dict[str, float]
    marks: list[str]


@dataclass(frozen=True)
class SourceRows:
    """What was read of a source; `epochs` and `repeats` as the run counted them. `tag`: what its curves begin with."""

    source: str
    tag: str
    rows: float
    epochs: float
    repeats: float


@dataclass(frozen=True)
class Facts:
    """A run as its folder tells it.

    Attributes:
        scalars: figures, step by step. events: of its life. left_out: records of what is not read any more.
        read: the last line of its rolling hash. generations: validation by validation.
    """

    run: Path
    config: Config
    scalars: list[Scalars]
    events: list[dict[str, Any]]
    checkpoints: list[Kept]
    left_out: dict[str, list[dict[str, Any]]]
    read: Line | None
    generations: list[Generations]

    @property
    def step(self) -> int:
        """The last step that anything is known of."""
        steps = [s.step for s in self.scalars] + [e["step"] for e in self.events] + [c.step for c in self.checkpoints]
        return max(steps, default=0)

    @property
    def end(self) -> str:
        """Why the run has ended, "" while it has not."""
        last = self.events[-1] if self.events else {}
        return str(last.get("reason", "finished")) if last.get("event") == "finish" else ""

    @property
    def restarts(self) -> list[int]:
        """The steps from which the run was resumed."""
        return [e["step"] for e in self.events if e["event"] == "resume"]

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a figure."""
        return curve(self.scalars, name)

    def last(self, name: str) -> float | None:
        """The newest value of a figure."""
        return next((s.values[name] for s in reversed(self.scalars) if name in s.values), None)

    def best(self, name: str) -> tuple[int, float] | None:
        """The step with the best value of a figure, and the value."""
        points = [(step, value) for step, value in zip(*self.curve(name), strict=True) if math.isfinite(value)]
        return _BETTER.get(name, min)(points, key=lambda point: point[1]) if points else None

    @property
    def match(self) -> str:
        """The name of the figure that generation is judged by."""
        names = ("validation/exact_match", "validation/next_block_match")
        return next((name for name in names if self.last(name) is not None), names[0])

    @property
    def best_generations(self) -> Generations | None:
        """Those of the best validation, by generation and then by bits per byte."""
        by_step = {s.step: s.values for s in self.scalars}

        def quality(found: Generations) -> tuple[float, float]:
            values = by_step.get(found.step, {})
            return values.get(self.match, -1.0), -values.get("validation/bits_per_byte", math.inf)

        return max(self.generations, key=quality, default=None)

    def seconds(self) -> dict[str, float]:
        """Seconds by what they were spent on, over the steps that the figures cover."""
        total, before = dict.fromkeys(TIMES, 0.0), 0
        for s in self.scalars:
            if "time/forward" in s.values:
                for name in TIMES:
                    total[name] += (s.step - before) * s.values.get(f"time/{name}", 0.0)
                before = s.step
        return total

    def sources(self) -> list[SourceRows]:
        """What was read of every source; of everything, where there are none."""
        last = next((s.values for s in reversed(self.scalars) if "data/rows" in s.values), {})
        found = []
        for tag in [name.removesuffix("/epochs") for name in last if name.endswith("/epochs")]:
            values = (last.get(f"{tag}/{figure}", 0.0) for figure in ("rows", "epochs", "repeats"))
            found.append(SourceRows("all" if tag == "data" else tag.removeprefix("data/"), tag, *values))
        return found

    def as_object(self) -> dict[str, Any]:
        """What `--json` prints."""
        metrics = ("validation/loss", "validation/bits_per_byte", self.match)
        return {
            "run": str(self.run),
            "step": self.step,
            "steps": self.config.training.steps,
            "ended": self.end or None,
            "last": self._last_values(),
            "best": {name: {"step": b[0], "value": b[1]} for name in metrics if (b := self.best(name))},
            "seconds": {name: round(seconds, 3) for name, seconds in self.seconds().items()},
            "sources": [asdict(source) for source in self.sources()],
            "left_out": self.left_out,
            "resumed_from_steps": self.restarts,
            "events": self.events,
            "checkpoints": [asdict(kept) for kept in self.checkpoints],
            "rolling_hash": self.read.rolling_hash if self.read else None,
        }

    def _last_values(self) -> dict[str, float]:
        last: dict[str, float] = {}
        for s in self.scalars:
            last |= s.values
        return last


def gather(run: Path) -> Facts:
    """Read the folder of a run.

    Raises:
        ConfigError: it is no run. UserError: a file of it cannot be read.
    """
    log = read_log(run)
    return Facts(
        run=run,
        config=run_config(run),
        scalars=read_scalars(run),
        events=read_events(run),
        checkpoints=_checkpoints(run / "checkpoints"),
        left_out=_left_out(run),
        read=log[-1] if log else None,
        generations=read_generations(run),
    )


def _checkpoints(folder: Path) -> list[Kept]:
    marks: dict[str, list[str]] = {}
    for file, what in (("best.json", "best generation"), ("best-loss.json", "lowest validation loss")):
        name = _read_json(folder / file).get("checkpoint")
        marks.setdefault(str(name), []).append(what)
    return [_kept(path, marks.get(path.name, [])) for path in complete_checkpoints(folder)]


def _kept(checkpoint: Path, marks: Sequence[str]) -> Kept:
    made = ckpt.load_state(checkpoint).provenance
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    return Kept(made.step, size, made.metrics, list(marks))


def _left_out(run: Path) -> dict[str, list[dict[str, Any]]]:
    """What the quarantine record lists, by kind."""
    return {kind: found for kind, found in _read_json(run / QUARANTINE).items() if isinstance(found, list) and found}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
