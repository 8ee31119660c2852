"""RUN/generations.jsonl: what the model wrote at every validation, with its trace; one JSON object a line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidal_dist.history.json_lines import StepLines, read_lines

GENERATIONS = "generations.jsonl"


@dataclass(frozen=True)
class Generations:
    """The examples of the validation after `step` steps; their keys are those of `training.validation.Outcome`."""

    step: int
    examples: list[dict[str, Any]]


def generations_log(run: Path, start: int) -> StepLines:
    """The log of a run that goes on from step `start`."""
    return StepLines(run / GENERATIONS, start)


def read_generations(run: Path) -> list[Generations]:
    """The examples of a run, validation by validation.

    Raises:
        UserError: the file cannot be read.
    """
    return [Generations(line["step"], line.get("examples", [])) for line in read_lines(run / GENERATIONS)]
