"""Results: of a job, in a file that appears whole and is refused where programs or configuration are others now."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import one_line
from data_pipeline.files import read_description, replace_file
from data_pipeline.section import Section
from experiments.places import JOB, RESULT
from experiments.spec import Job, Reaches
from tidal_dist.errors import UserError

FORMAT = 1
MOST_POINTS = 60  # of a curve that is published
_REMEDY = "give --redo to make it anew"
_LIST_OF_NUMBERS = re.compile(r"\[[-+.\deE,\s]+\]")
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

Curve = list[tuple[int, float]]  # step and value


@dataclass(frozen=True)
class Key:
    """What a result belongs to: `config`, a job's own key; `sources`, the programs'; `commit`, for people."""

    config: str
    sources: str
    commit: str | None = None

    def differs(self, other: "Key") -> str:
        """Why a result of this key is none of the other's; "" if it is one."""
        if self.config != other.config:
            return "another configuration"
        if self.sources != other.sources:
            return f"other sources (commit {self.commit or 'unknown'})"
        return ""


@dataclass(frozen=True)
class Result:
    """What became of a job.

    Attributes:
        figures: of the evaluation: parameters, training_flops, training_bytes, steps, and of each of tests by name
            exact_match or None, bits_per_byte, count.
        curves: of validation, by metric. data: documents and distinct ones of training, and documents of a step.
        made: date, seconds, machine. samples: of texts, what the model writes (`experiments.samples`).
    """

    key: Key
    figures: dict[str, Any]
    curves: dict[str, Curve]
    data: dict[str, float]
    made: dict[str, Any]
    samples: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> "Result":
        """A result from its file's content."""
        key, figures, made = Key(**content["key"]), _finite_or_not(content["figures"]), content["made"]
        curves = {m: [(int(s), float(v)) for s, v in points] for m, points in content["curves"].items()}
        return cls(key, figures, curves, dict(content["data"]), dict(made), list(content.get("samples", [])))

    def as_json(self) -> dict[str, Any]:
        """The content of its file."""
        return _named({"format": FORMAT} | asdict(self))

    def reached(self, reaches: Reaches) -> int | None:
        """The first validated step that is as good; none: it never was."""
        return next((step for step, value in self.curves.get(reaches.metric, []) if reaches.holds(value)), None)

    def distinct_until(self, step: int) -> float:
        """About how many different documents were seen until a step.

        Of D different documents, each of which occurs r times among n in an order by chance, k of the n leave a share
        of (1 - k / n)^r unseen.
        """
        documents, distinct = self.data["documents"], self.data["distinct"]
        seen = min(step * self.data["documents_per_step"] / documents, 1.0)
        return distinct * (1.0 - (1.0 - seen) ** (documents / distinct))

    def thinned(self, reaches: Reaches | None) -> "Result":
        """The same with curves of few points; the one that is first as good as asked for stays."""
        curves = {}
        for metric, points in self.curves.items():
            kept = self.reached(reaches) if reaches and reaches.metric == metric else None
            curves[metric] = thin(points, kept)
        return replace(self, curves=curves)


def thin(points: Curve, kept: int | None = None) -> Curve:
    """At most `MOST_POINTS` points, evenly chosen, first and last among them, and that of the step `kept`."""
    if len(points) <= MOST_POINTS:
        return points
    chosen = {round(i * (len(points) - 1) / (MOST_POINTS - 2)) for i in range(MOST_POINTS - 1)}
    return [point for i, point in enumerate(points) if i in chosen or point[0] == kept]


def write_result(folder: Path, result: Result) -> None:
    """Let a job's result appear.

    Raises:
        UserError: it cannot be written.
    """
    replace_file(folder / RESULT, as_bytes(result.as_json()))


def as_bytes(content: Mapping[str, Any]) -> bytes:
    """JSON for people; a list of numbers stays on its line."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    return (_LIST_OF_NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n").encode()


@dataclass(frozen=True)
class Standing:
    """How far a job is: its result if it is there; or why what is there does not count."""

    result: Result | None = None
    refused: str = ""


def standing(folder: Path, key: Key) -> Standing:
    """How far the job with this key is, in its folder."""
    for name, what in ((RESULT, "made"), (JOB, "begun")):
        if not (folder / name).exists():
            continue
        try:
            content, _ = read_description(folder / name, FORMAT, {"key"}, UserError, "", _REMEDY)
            if reason := Key(**content["key"]).differs(key):
                return Standing(refused=f"{what} with {reason}")
            if name == RESULT:
                return Standing(Result.of_json(content))
        except (UserError, KeyError, TypeError, ValueError) as error:
            return Standing(refused=f"cannot be read ({one_line(error)})")
    return Standing()


def write_job(folder: Path, job: Job, key: Key, data: Path) -> None:
    """Say what a folder is of; what is there of the same key stays."""
    content = {
        "format": FORMAT,
        "key": asdict(key),
        "name": job.name,
        "task": job.task,
        "options": job.options,
        "seed": job.seed,
        "data": str(data),
    }
    replace_file(folder / JOB, as_bytes(content))


class JobFile(Section):
    """What `job.json` says."""

    format: int
    key: dict[str, str | None]
    name: str
    task: str
    options: dict[str, Any]
    seed: int
    data: str


def read_job(folder: Path) -> JobFile:
    """What a folder is of.

    Raises:
        UserError: it cannot be read.
    """
    content, _ = read_description(folder / JOB, FORMAT, set(JobFile.model_fields), UserError, f"{folder}: no job", "")
    return JobFile.model_validate(content)


def _named(value: Any) -> Any:
    """Numbers that JSON does not know as their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {key: _named(inner) for key, inner in value.items()}
    return [_named(inner) for inner in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _finite_or_not(value: Any) -> Any:
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    return {key: _finite_or_not(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value
