"""What an experiment is: one YAML file, EXPERIMENT.yaml in the folder of its set, strict. Nothing here knows a variant.

title: Sums of three digits from few samples
asks: One sentence, the question.
task: sums                       # a name of experiments.tasks
options: {digits: 3}             # the task's
base: {data: ..., model: ...}    # sections of the configuration of a run
variants:
  tidal: {}
  bytes: {model.writes: bytes, options.distinct: 500}    # what differs from base and options
seeds: [1, 2, 3]                 # of the task, the order of the rows, and the weights
reaches: {metric: exact_match, value: 0.99}
plot: {kind: curve}
"""

import copy
import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from data_pipeline.section import Section
from tidal_dist.config import Config, parse_config, parse_section, read_yaml
from tidal_dist.errors import ConfigError

Metric = Literal["exact_match", "bits_per_byte"]

# Where a figure of a run is better when it is less.
LESS_IS_BETTER: frozenset[Metric] = frozenset(["bits_per_byte"])

_NAME = r"^[A-Za-z0-9][A-Za-z0-9 ._+-]*$"  # of what becomes a folder
# What a job sets itself.
_OWN = ("run_dir", "corpus", "data.shards", "data.seed", "training.seed")
# What suits small jobs side by side, where an experiment says nothing else.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "training": {"zero_stage": 0, "threads_per_rank": 1, "activation_checkpointing": False},
    "data": {"workers": 0},
    "prepare": {"workers": 1},
    "monitor": {"pictures": False, "report": False},
}
# In the place of what is the job's own, so that a configuration is whole before it is known where its files will be.
_ANYWHERE = "anywhere"


class Reaches(Section):
    """A value of a metric at validation; the steps and different samples to it are told."""

    metric: Metric = "exact_match"
    value: float

    def holds(self, value: float) -> bool:
        """Whether a value is as good."""
        return value <= self.value if self.metric in LESS_IS_BETTER else value >= self.value


class Table(Section):
    """What the table of an experiment shows."""

    tests: list[str] = Field(["*"], min_length=1, description="names or patterns of tests, in this order")
    metrics: list[Metric] | None = Field(
        None, min_length=1, description="of each test; none: exact match where there is one, else bits per byte"
    )


class Plot(Section):
    """What the picture of an experiment shows: of each variant the mean and the standard deviation over its seeds."""

    kind: Literal["curve", "bars", "by_test"] = Field(
        description="curve: the metric at validation, over training; bars: of tests; by_test: over what numbers tests"
    )
    metric: Metric = "exact_match"
    x: Literal["steps", "bytes", "flops"] = Field("steps", description="of a curve: what of the training is counted")
    tests: list[str] = Field(["*"], min_length=1, description="names or patterns of the tests that are drawn")
    variants: list[str] | None = Field(None, min_length=1, description="those that are drawn; none: all")
    label: str | None = Field(None, description="of the axis of tests; none: test")
    mark: float | None = Field(None, description="where a line stands on the axis of tests: the longest of training")
    logarithmic: bool = Field(False, description="of a curve: both axes of counts in powers of ten")


class Spec(Section):
    """An experiment."""

    title: str = Field(min_length=1)
    asks: str = Field(min_length=1, description="the question, in one sentence")
    task: str
    options: dict[str, Any] = Field(default_factory=dict, description="the task's")
    base: dict[str, Any] = Field(description="sections of a run's configuration, the same for all variants")
    variants: dict[str, dict[str, Any]] = Field(
        min_length=1, description="by name: what differs, as section.key: value or options.key: value"
    )
    seeds: list[int] = Field(min_length=1)
    reaches: Reaches | None = None
    table: Table = Table()
    plot: Plot

    @field_validator("variants")
    @classmethod
    def _can_be_folders(cls, variants: dict[str, Any]) -> dict[str, Any]:
        if bad := [name for name in variants if not re.match(_NAME, name)]:
            raise ValueError(f"{bad[0]!r} is no name of a variant: letters, digits, spaces and . _ + - alone")
        return variants

    @field_validator("seeds")
    @classmethod
    def _differ(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError("seeds must differ, and be 0 or more")
        return seeds


@dataclass(frozen=True)
class Job:
    """One training with its evaluation.

    Attributes:
        options: the task's. config: of the run; where its files are is not said yet.
    """

    experiment: str
    variant: str
    seed: int
    task: str
    options: dict[str, Any]
    config: Config

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.experiment}/{self.variant} seed {self.seed}"

    @property
    def key(self) -> str:
        """Of all that the result depends on, beside the programs."""
        return _hash_of(
            {"task": self.task, "options": self.options, "seed": self.seed, "config": self.config.model_dump()}
        )

    @property
    def data_key(self) -> str:
        """The same of the prepared corpus, which variants may share."""
        return _hash_of(
            {
                "task": self.task,
                "options": self.options,
                "seed": self.seed,
                "tokenizer": self.config.tokenizer.model_dump(),
                "segmentation": self.config.segmentation.model_dump(),
                "data": self.config.data.model_dump(
                    include={"shard_bytes", "row_tokens", "row_chars", "overlap_tokens"}
                ),
            }
        )


@dataclass(frozen=True)
class Experiment:
    """An experiment of a set, by the name of its file, with its jobs."""

    name: str
    spec: Spec
    jobs: list[Job]


def load_set(folder: Path) -> list[Experiment]:
    """All experiments of a set, by name.

    Raises:
        ConfigError: there is no such set, or an experiment of it is wrong.
    """
    files = sorted(folder.glob("*.yaml"))
    if not files:
        there = sorted({path.parent.name for path in folder.parent.glob("*/*.yaml")})
        raise ConfigError(f"{folder}: no experiments (*.yaml) there; sets beside it: {', '.join(there) or 'none'}")
    return [load_experiment(path) for path in files]


def load_experiment(path: Path) -> Experiment:
    """An experiment with its jobs, each of which is checked.

    Raises:
        ConfigError: a key or value is wrong.
    """
    spec = parse_section(Spec, read_yaml(path), str(path))
    _check_task(spec, path)
    for name in spec.plot.variants or ():
        one_of(name, spec.variants, f"{path}: plot.variants", "variant")
    jobs = [_job(path, spec, variant, seed) for variant in spec.variants for seed in spec.seeds]
    return Experiment(path.stem, spec, jobs)


def one_of(name: str, known: Mapping[str, Any], where: str, what: str) -> None:
    """Raises ConfigError where a name is not among those that are known."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
        raise ConfigError(f"{where}: no {what} {name!r}; {hint}")


def _check_task(spec: Spec, path: Path) -> None:
    from experiments.tasks import TASKS

    one_of(spec.task, TASKS, f"{path}: task", "task")


def _job(path: Path, spec: Spec, variant: str, seed: int) -> Job:
    where = f"{path}, variant {variant}"
    content = copy.deepcopy({"options": spec.options} | spec.base)
    for key, value in spec.variants[variant].items():
        _change(content, key, value, where)
    options = content.pop("options")
    _check_options(spec.task, options, where)
    for own in _OWN:
        section, _, key = own.partition(".")
        if section in content and (not key or key in _section(content, section, where)):
            raise ConfigError(f"{where}: {own} is set by the experiment's jobs; leave it out")
    for name, defaults in _DEFAULTS.items():
        content[name] = defaults | _section(content, name, where)
    content |= {"run_dir": _ANYWHERE, "corpus": {"sources": [{"path": _ANYWHERE, "format": "jsonl"}]}}
    content["data"] |= {"shards": _ANYWHERE, "seed": seed}
    content["training"] |= {"seed": seed}
    return Job(path.stem, variant, seed, spec.task, options, parse_config(content, where))


def _change(content: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    *sections, key = dotted.split(".")
    if not sections or not all([*sections, key]):
        raise ConfigError(f"{where}: {dotted}: write section.key or options.key, such as model.width")
    for name in sections:
        content = _section(content, name, f"{where}: {dotted}")
    content[key] = copy.deepcopy(value)


def _section(content: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    section = content.setdefault(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{where}: {name} is a value ({section!r}), not a section")
    return section


def _check_options(task: str, options: dict[str, Any], where: str) -> None:
    """Before anything is started, where the task says what its options are."""
    from experiments.tasks import TASKS

    known = getattr(TASKS[task], "options", None)
    if isinstance(known, type) and issubclass(known, Section):
        parse_section(known, options, f"{where}, options")


def _hash_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
