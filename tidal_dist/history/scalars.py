"""RUN/scalars.jsonl: every figure that TensorBoard shows as a curve, one JSON object a line."""

from dataclasses import dataclass
from pathlib import Path

from tidal_dist.history.json_lines import StepLines, read_lines

SCALARS = "scalars.jsonl"


@dataclass(frozen=True)
class Scalars:
    """The figures of one step by TensorBoard's names. `time`: of the last of them, seconds since 1970."""

    step: int
    time: float
    values: dict[str, float]


def scalars_log(run: Path, start: int) -> StepLines:
    """The log of a run that goes on from step `start`."""
    return StepLines(run / SCALARS, start)


def read_scalars(run: Path) -> list[Scalars]:
    """The figures of a run, step by step; [] where there are none.

    Raises:
        UserError: the file cannot be read.
    """
    found: dict[int, Scalars] = {}
    for line in read_lines(run / SCALARS):
        step, time = line.pop("step"), float(line.pop("time", 0.0))
        before = found[step].values if step in found else {}
        values = {name: float(v) for name, v in line.items() if isinstance(v, int | float)}
        found[step] = Scalars(step, time, before | values)
    return [found[step] for step in sorted(found)]


def curve(scalars: list[Scalars], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one figure."""
    points = [(s.step, s.values[name]) for s in scalars if name in s.values]
    return [step for step, _ in points], [value for _, value in points]
