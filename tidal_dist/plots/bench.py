"""Measurements as pictures: bars of one figure for several ways, and curves over a size."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tidal_dist.plots.canvas import DOTS_PER_INCH, INK, PALE_INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS, _OTHERS = "#3b6fb6", "#b9c3cf"
_COLOURS = ("#3b6fb6", "#d1662f", "#2f8f6b", "#9a5fb4")
_WIDTH, _BAR, _EDGES = 7.0, 0.32, 1.1  # inches


def bars_figure(title: str, unit: str, bars: Mapping[str, float], ours: Sequence[str], note: str = "") -> "Figure":
    """A bar for each way, by name, with its figure.

    Args:
        ours: names of the bars that are not baselines. note: a line below.
    """
    figure, axes = _page(title, note, _EDGES + _BAR * len(bars))
    names = list(bars)[::-1]
    drawn = axes.barh(names, [bars[n] for n in names], color=[_OURS if n in ours else _OTHERS for n in names])
    axes.bar_label(drawn, [f"{bars[n]:,.3g}" for n in names], padding=3, fontsize=8, color=INK)
    axes.margins(x=0.12)
    axes.set_xlabel(unit, fontsize=8, color=PALE_INK)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    return figure


def growth_figure(
    title: str, size: str, unit: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], note: str = ""
) -> "Figure":
    """Curves of points (sizes, values) by name; both axes are logarithmic, so that a slope of 1 is linear growth."""
    figure, axes = _page(title, note, 3.6)
    for colour, (name, (sizes, values)) in zip(_COLOURS, curves.items(), strict=False):
        axes.plot(sizes, values, marker="o", markersize=3.5, linewidth=1.4, color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    ticks = sorted({s for sizes, _ in curves.values() for s in sizes})
    axes.set_xticks(ticks, [f"{t:,.0f}" for t in ticks])
    axes.set_xlabel(size, fontsize=8, color=PALE_INK)
    axes.set_ylabel(unit, fontsize=8, color=PALE_INK)
    axes.grid(which="major", color="#e4e4e4", linewidth=0.8)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    return figure


def _page(title: str, note: str, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10, weight="bold", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=8, labelcolor=PALE_INK, color=PALE_INK)
    if note:
        figure.supxlabel(note, x=0.01, ha="left", fontsize=7, color=PALE_INK)
    return figure, axes
