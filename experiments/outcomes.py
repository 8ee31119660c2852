"""What an experiment came to: the results of all its jobs, collected, and their means and spreads over the seeds."""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.places import Places
from experiments.results import FORMAT, Key, Result, standing
from experiments.spec import Experiment, Metric, Spec
from tidal_dist.errors import UserError

_REMEDY = "run the experiment anew, and report it"


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of a sample: by n - 1) of some seeds' values; 0 where there is one."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """None where there are no values."""
        if not values:
            return None
        if not all(map(math.isfinite, values)):
            return cls(math.nan, math.nan, len(values))  # a run that went wrong is not averaged away
        return cls(mean(values), stdev(values) if len(values) > 1 else 0.0, len(values))


@dataclass(frozen=True)
class Outcome:
    """An experiment with the results that there are.

    Attributes:
        results: by variant and seed. missing: names of jobs without one, and why.
    """

    experiment: Experiment
    results: dict[str, dict[int, Result]]
    missing: list[str]

    @property
    def spec(self) -> Spec:
        """The experiment's."""
        return self.experiment.spec

    @property
    def all_results(self) -> list[Result]:
        """Of all variants and seeds."""
        return [result for seeds in self.results.values() for result in seeds.values()]

    def spread(self, variant: str, value: Callable[[Result], float | None]) -> Spread | None:
        """Of a value over a variant's seeds, those that have it."""
        found = [value(result) for result in self.results[variant].values()]
        return Spread.of([each for each in found if each is not None])

    def tested(self, variant: str, test: str, metric: Metric) -> Spread | None:
        """Of a figure of a test."""
        return self.spread(variant, lambda result: result.figures["tests"].get(test, {}).get(metric))

    def tests(self, patterns: Sequence[str]) -> list[str]:
        """Names of the tests that the patterns name, in their order, numbers in names by their size.

        Raises:
            UserError: a pattern names none.
        """
        names = sorted({name for result in self.all_results for name in result.figures["tests"]}, key=_by_numbers)
        found: dict[str, None] = {}
        for pattern in patterns:
            named = [name for name in names if fnmatchcase(name, pattern)]
            if names and not named:
                raise UserError(f"{self.experiment.name}: no test {pattern!r}; there are: {', '.join(names)}")
            found |= dict.fromkeys(named)
        return list(found)

    def main_metric(self, test: str) -> Metric:
        """Exact match where there is one."""
        exact = any(r.figures["tests"].get(test, {}).get("exact_match") is not None for r in self.all_results)
        return "exact_match" if exact else "bits_per_byte"

    def curve(self, variant: str, metric: Metric) -> list[tuple[int, Spread]]:
        """Of the steps that all seeds of a variant were validated at."""
        curves = [dict(result.curves.get(metric, [])) for result in self.results[variant].values()]
        steps = set.intersection(*map(set, curves)) if curves else set()
        spreads = [(step, Spread.of([values[step] for values in curves])) for step in sorted(steps)]
        return [(step, spread) for step, spread in spreads if spread]


def collect(experiment: Experiment, places: Places, published: Path) -> Outcome:
    """The results of an experiment: of its jobs' folders, and where these have none of the published file.

    Args:
        published: the JSON file of an earlier report; what it has of other sources or configurations does not count.
    """
    earlier = _published(published)
    results: dict[str, dict[int, Result]] = {variant: {} for variant in experiment.spec.variants}
    missing = []
    for job in experiment.jobs:
        key = Key(job.key, places.sources)
        found = standing(places.job(job), key)
        result, reason = found.result, found.refused
        before = earlier.get(job.variant, {}).get(str(job.seed))
        if result is None and before is not None:
            differs = before.key.differs(key)
            result, reason = (before, "") if not differs else (None, reason or f"published with {differs}")
        if result is None:
            missing.append(f"{job.name} ({reason or 'no result'})")
        else:
            results[job.variant][job.seed] = result.thinned(experiment.spec.reaches)
    return Outcome(experiment, results, missing)


def as_json(outcome: Outcome, set_name: str) -> dict[str, Any]:
    """What is published of an experiment."""
    return {
        "format": FORMAT,
        "set": set_name,
        "experiment": outcome.experiment.name,
        "missing": outcome.missing,
        "spec": outcome.spec.model_dump(mode="json"),
        "results": {
            variant: {str(seed): result.as_json() for seed, result in seeds.items()}
            for variant, seeds in outcome.results.items()
        },
    }


def _published(path: Path) -> dict[str, dict[str, Result]]:
    try:
        content = json.loads(path.read_bytes())
        return {
            variant: {seed: Result.of_json(result) for seed, result in seeds.items()}
            for variant, seeds in content["results"].items()
            if content["format"] == FORMAT
        }
    except FileNotFoundError:
        return {}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error!r}); remove it") from None


def number_of(test: str) -> float | None:
    """The number that the name of a test ends with: 12 of `digits-12`."""
    found = re.search(r"(\d+)$", test)
    return float(found[1]) if found else None


def _by_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def distinct(values: Iterable[Any]) -> list[str]:
    """Different values that are there, as texts, in their order."""
    return list(dict.fromkeys(str(value) for value in values if value is not None))
