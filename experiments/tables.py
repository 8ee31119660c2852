"""An experiment as Markdown: the question, a table of means and standard deviations over seeds, where it was made."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from experiments.outcomes import Outcome, Spread, distinct
from experiments.results import Result
from experiments.spec import Metric

_SHORT = {"exact_match": "exact match", "bits_per_byte": "bits per byte"}
_NONE = "–"


def as_markdown(outcome: Outcome, picture: str) -> str:
    """All that is said of an experiment; `picture`: path of its picture from the page."""
    spec = outcome.spec
    parts = [f"### {spec.title}", spec.asks]
    if outcome.missing:
        parts.append(f"**Incomplete.** Missing: {'; '.join(outcome.missing)}.")
    if outcome.all_results:
        parts += [_as_table(_columns(outcome)), f"![{spec.title}]({picture})", _made(outcome)]
    return "\n\n".join(parts)


def samples_as_markdown(outcome: Outcome) -> str:
    """How each variant's first seed goes on after the same beginnings, side by side; "" where nothing was written."""
    first = {v: next(iter(seeds.values())).samples for v, seeds in outcome.results.items() if seeds}
    written = {variant: samples for variant, samples in first.items() if samples}
    if not written:
        return ""
    parts = [f"# {outcome.spec.title}: texts side by side", "Sampled, with the same beginnings for all; JSON strings."]
    for number, shown in enumerate(next(iter(written.values()))):
        parts += [
            f"## {number + 1}",
            f"after: `{_quoted(shown['context'])}`",
            f"there: `{_quoted(shown['reference'])}`",
        ]
        parts += [f"**{variant}**: `{_quoted(samples[number]['text'])}`" for variant, samples in written.items()]
    return "\n\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("`", "\u02cb")


Column = tuple[str, list[str]]


def _columns(outcome: Outcome) -> list[Column]:
    """What is told of each variant: headings with a cell for each."""
    variants = list(outcome.results)

    def column(heading: str, cell: Callable[[str], str]) -> Column:
        return heading, [cell(variant) if outcome.results[variant] else _NONE for variant in variants]

    def figure(name: str) -> Callable[[str], str]:
        return lambda variant: _rounded(outcome.spread(variant, lambda result: result.figures[name]))

    columns: list[Column] = [
        ("variant", variants),
        column("seeds", lambda variant: str(len(outcome.results[variant]))),
        column("parameters", figure("parameters")),
        column("training FLOPs", figure("training_flops")),
        column("training bytes", figure("training_bytes")),
    ]
    for test in outcome.tests(outcome.spec.table.tests):
        for metric in outcome.spec.table.metrics or [outcome.main_metric(test)]:
            columns.append(column(f"{test}, {_SHORT[metric]}", lambda v, t=test, m=metric: _tested(outcome, v, t, m)))  # type: ignore[misc]
    return columns + _reached_columns(outcome, column)


def _reached_columns(outcome: Outcome, column: Callable[[str, Callable[[str], str]], Column]) -> list[Column]:
    reaches = outcome.spec.reaches
    if reaches is None:
        return []
    goal = f"{_SHORT[reaches.metric]} {reaches.value:g}"

    def told(variant: str, value: Callable[[Result, int], float]) -> str:
        found = [(result, result.reached(reaches)) for result in outcome.results[variant].values()]
        values = [value(result, step) for result, step in found if step is not None]
        if not values:
            return "not reached"
        some = f" ({len(values)} of {len(found)} seeds)" if len(values) < len(found) else ""
        return _rounded(Spread.of(values)) + some

    return [
        column(f"steps to {goal}", lambda v: told(v, lambda _, step: step)),
        column("different samples seen by then, about", lambda v: told(v, lambda r, step: r.distinct_until(step))),
    ]


def _tested(outcome: Outcome, variant: str, test: str, metric: Metric) -> str:
    spread = outcome.tested(variant, test, metric)
    if spread is None:
        return _NONE
    if not math.isfinite(spread.mean):
        return "not finite"
    return f"{spread.mean:.3f}" + (f" ± {spread.deviation:.3f}" if spread.count > 1 else "")


def _rounded(spread: Spread | None) -> str:
    """Such as 112,345 or 1.23e+14, and the deviation where there is one."""
    if spread is None:
        return _NONE
    if not math.isfinite(spread.mean):
        return "not finite"
    shape = ".2e" if spread.mean >= 1e10 else ",.0f" if spread.mean >= 100 or spread.mean == int(spread.mean) else ".2f"
    deviation = format(spread.deviation, shape)
    return format(spread.mean, shape) + (f" ± {deviation}" if float(deviation.replace(",", "")) else "")


def _as_table(columns: Sequence[Column]) -> str:
    """A row for each variant; where there are more figures than variants, a column for each instead."""
    rows = [[heading, *cells] for heading, cells in columns]
    if len(columns) <= len(columns[0][1]) + 5:
        rows = [list(row) for row in zip(*rows, strict=True)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _made(outcome: Outcome) -> str:
    """Seeds, dates, machines, commits."""
    results = outcome.all_results
    dates = sorted({result.made["date"] for result in results})
    commits = distinct(result.key.commit for result in results)
    seconds = sum(result.made["training_seconds"] + result.made["evaluation_seconds"] for result in results)
    parts = [
        "Mean ± standard deviation over the seeds",
        " to ".join(dict.fromkeys([dates[0], dates[-1]])),
        " and ".join(distinct(_machine(result.made["machine"]) for result in results)),
        f"commit {', '.join(commits) or 'unknown'}",
        f"{seconds / 60:.0f} minutes of jobs",
    ]
    return "; ".join(parts) + "."


def _machine(machine: dict[str, Any]) -> str:
    gpu = machine.get("gpu", "no GPU")
    return f"{machine['cpu']}, {machine['cores']} cores, {gpu}; torch {machine['torch']}, Python {machine['python']}"
