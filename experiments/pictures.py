"""An experiment as a picture of a page's width: means as lines or bars, standard deviations over seeds around them."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.outcomes import Outcome, Spread, number_of
from experiments.spec import Plot
from tidal_dist.plots.canvas import DOTS_PER_INCH, INK, PALE_INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart; lines differ by their marks and strokes too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STROKES = ("-", "--", ":", "-.")
_WIDTH, _HEIGHT, _BAR, _EDGES = 7.0, 3.7, 0.2, 1.3  # inches
_BAND = 0.16  # opacity
_FEW_POINTS = 25
_NAMES = {"exact_match": "exact match", "bits_per_byte": "bits per byte"}
_COUNTED = {"steps": "step", "bytes": "bytes of text trained on", "flops": "training FLOPs"}

Points = Sequence[tuple[float, Spread]]


def figure_of(outcome: Outcome) -> "Figure":
    """The picture that the experiment asks for."""
    return {"curve": _curve, "bars": _bars, "by_test": _by_test}[outcome.spec.plot.kind](outcome)


def _curve(outcome: Outcome) -> "Figure":
    plot = outcome.spec.plot
    figure, axes = _page(outcome, _HEIGHT)
    for number, variant in _drawn(outcome):
        scale = _per_step(outcome, variant, plot)
        _line(axes, number, variant, [(s * scale, v) for s, v in outcome.curve(variant, plot.metric)], plot)
    if plot.logarithmic:
        axes.set_xscale("log")
    axes.set_xlabel(_COUNTED[plot.x], fontsize=9, color=PALE_INK)
    _finish_lines(axes, plot)
    if outcome.spec.reaches and outcome.spec.reaches.metric == plot.metric:
        axes.axhline(outcome.spec.reaches.value, color="#888888", linewidth=0.8, linestyle=":")
    return figure


def _per_step(outcome: Outcome, variant: str, plot: Plot) -> float:
    """What is counted, of a step; it grows evenly."""
    name = {"bytes": "training_bytes", "flops": "training_flops"}.get(plot.x)
    spread = outcome.spread(variant, lambda r: r.figures[name] / r.figures["steps"]) if name else None
    return spread.mean if spread else 1.0


def _by_test(outcome: Outcome) -> "Figure":
    plot = outcome.spec.plot
    figure, axes = _page(outcome, _HEIGHT)
    tests = outcome.tests(plot.tests)
    numbers = [number for test in tests if (number := number_of(test)) is not None]
    are_numbers = len(set(numbers)) == len(tests)
    at = numbers if are_numbers else [float(i) for i in range(len(tests))]
    for number, variant in _drawn(outcome):
        found = [(x, outcome.tested(variant, test, plot.metric)) for x, test in zip(at, tests, strict=True)]
        _line(axes, number, variant, [(x, spread) for x, spread in found if spread], plot)
    if not are_numbers:
        axes.set_xticks(at, tests, rotation=25, ha="right")
    axes.set_xlabel(plot.label or "test", fontsize=9, color=PALE_INK)
    _finish_lines(axes, plot)
    if plot.mark is not None:
        axes.axvline(plot.mark, color="#888888", linewidth=0.9, linestyle=":")
        axes.annotate("trained", (plot.mark, 0.5), (-3, 0), xycoords=("data", "axes fraction"), fontsize=8,
                      textcoords="offset points", ha="right", va="center", color=PALE_INK)  # fmt: skip
    return figure


def _line(axes: "Axes", number: int, name: str, points: Points, plot: Plot) -> None:
    """A mean with a band of one standard deviation; shares stay between 0 and 1."""
    low, high = (0.0, 1.0) if plot.metric == "exact_match" else (-math.inf, math.inf)
    colour, stroke = _COLOURS[number % len(_COLOURS)], _STROKES[number // len(_COLOURS) % len(_STROKES)]
    marker = _MARKERS[number % len(_MARKERS)] if len(points) <= _FEW_POINTS else ""
    xs, means = [x for x, _ in points], [spread.mean for _, spread in points]
    axes.plot(xs, means, color=colour, linestyle=stroke, marker=marker, markersize=4, linewidth=1.6, label=name)
    below = [max(spread.mean - spread.deviation, low) for _, spread in points]
    above = [min(spread.mean + spread.deviation, high) for _, spread in points]
    axes.fill_between(xs, below, above, color=colour, alpha=_BAND, linewidth=0)


def _finish_lines(axes: "Axes", plot: Plot) -> None:
    axes.set_ylabel(_NAMES[plot.metric], fontsize=9, color=PALE_INK)
    if plot.metric == "exact_match":
        axes.set_ylim(-0.03, 1.03)
    elif plot.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain)
        axes.yaxis.set_minor_formatter(_plain)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.legend(fontsize=8.5, frameon=False, labelcolor=INK, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _plain(value: float, _: float) -> str:
    return f"{value:g}" if f"{value:e}"[0] in "1234568" else ""


def _bars(outcome: Outcome) -> "Figure":
    """Of each test a group of bars, one for each variant."""
    plot, drawn = outcome.spec.plot, _drawn(outcome)
    tests = outcome.tests(plot.tests)
    figure, axes = _page(outcome, _EDGES + _BAR * len(tests) * (len(drawn) + 1))
    height = 1 / (len(drawn) + 1)
    for place, (number, variant) in enumerate(drawn):
        spreads = [outcome.tested(variant, test, plot.metric) for test in tests]
        there = [(row, spread) for row, spread in enumerate(spreads) if spread]
        _bars_of_variant(
            axes, [row + place * height for row, _ in there], [s for _, s in there], height, number, variant
        )
    axes.set_yticks([row + (len(drawn) - 1) * height / 2 for row in range(len(tests))], tests)
    axes.invert_yaxis()
    axes.set_xlabel(_NAMES[plot.metric], fontsize=9, color=PALE_INK)
    axes.margins(x=0.13)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    axes.legend(fontsize=8.5, frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _bars_of_variant(
    axes: "Axes", at: Sequence[float], spreads: Sequence[Spread], height: float, number: int, name: str
) -> None:
    means, deviations = [spread.mean for spread in spreads], [spread.deviation for spread in spreads]
    hatch = ("", "//", "..", "xx")[number // len(_COLOURS) % 4]
    axes.barh(at, means, height * 0.9, xerr=deviations, color=_COLOURS[number % len(_COLOURS)], hatch=hatch, label=name,
              error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 2})  # fmt: skip
    for y, spread in zip(at, spreads, strict=True):
        if math.isfinite(spread.mean):
            axes.annotate(f"{spread.mean:.3f}", (spread.mean + spread.deviation, y), (4, 0), textcoords="offset points",
                          fontsize=7.5, va="center", color=INK)  # fmt: skip


def _drawn(outcome: Outcome) -> list[tuple[int, str]]:
    """The variants that are drawn and have results; each keeps its number among the former, and so its colour."""
    wanted = [v for v in outcome.results if v in (outcome.spec.plot.variants or outcome.results)]
    return [(i, v) for i, v in enumerate(wanted) if outcome.results[v]]


def _page(outcome: Outcome, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(outcome.spec.title, loc="left", fontsize=10.5, weight="bold", color=INK, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=8.5, labelcolor=PALE_INK, color=PALE_INK)
    figure.supxlabel(_note(outcome), x=0.01, ha="left", fontsize=7.5, color=PALE_INK)
    return figure, axes


def _note(outcome: Outcome) -> str:
    counts = sorted({len(seeds) for seeds in outcome.results.values() if seeds})
    seeds = " to ".join(str(count) for count in dict.fromkeys([counts[0], counts[-1]]))
    note = f"mean and standard deviation over {seeds} seed{'s' if counts[-1] > 1 else ''}"
    return note + ("; INCOMPLETE" if outcome.missing else "")
