"""Curves of a run over its steps, as pictures of a page."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from tidal_dist.plots.canvas import INK, PALE_INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (6.4, 3.0)  # inches
_MOST_POINTS = 800  # of a curve; between them, means
_COLOURS = ("#3b6fb6", "#d1662f", "#2f8f6b", "#9a5fb4", "#b3902c", "#5b6b7b", "#c04a6b", "#4aa3b8")


# Where the axis of the values begins: where they do, at 0, from 0 to 1, or in powers of ten.
Axis = Literal["free", "zero", "share", "logarithmic"]


@dataclass(frozen=True)
class Curve:
    """A figure over steps; drawn with its points where there are few."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]


def curves_figure(curves: Sequence[Curve], unit: str, marks: Sequence[int] = (), axis: Axis = "free") -> "Figure":
    """Curves in one picture.

    Args:
        unit: of all values. marks: steps at which the run was started again.
    """
    figure, axes = _empty(unit, marks)
    for i, curve in enumerate(curves):
        steps, values = _thinned(curve)
        marker = "o" if len(steps) <= 30 else ""
        axes.plot(steps, values, marker=marker, markersize=3, linewidth=1.4, color=_COLOURS[i % len(_COLOURS)])
        _draw_not_finite(axes, curve, _COLOURS[i % len(_COLOURS)])
    _set_axis(axes, axis, max((_finite(curve.values).max(initial=0.0) for curve in curves), default=0.0))
    axes.set_xlim(left=0)
    _name(axes, [curve.name for curve in curves])
    return figure


def _set_axis(axes: "Axes", axis: Axis, top: float) -> None:
    if axis == "share":
        axes.set_ylim(-0.02, 1.02)
    elif axis == "zero":
        axes.set_ylim(bottom=0.0, top=1.05 * top or 1.0)
    elif axis == "logarithmic" and top > 0:
        axes.set_yscale("log")
        for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            ticks(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")


def areas_figure(curves: Sequence[Curve], unit: str, marks: Sequence[int] = ()) -> "Figure":
    """Curves of the same steps on top of each other: parts of a whole, the first at the bottom."""
    figure, axes = _empty(unit, marks)
    thin = [_thinned(curve) for curve in curves]
    if thin:
        axes.stackplot(thin[0][0], [values for _, values in thin], colors=_COLOURS, linewidth=0)
    axes.set_xlim(left=0)
    axes.margins(y=0)
    _name(axes, [curve.name for curve in curves])
    return figure


def to_svg(figure: "Figure") -> bytes:
    """The figure as SVG whose letters are text."""
    import matplotlib as mpl

    file = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tidal"}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"]))
    return file.getvalue()


def _empty(unit: str, marks: Sequence[int]) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=_SIZE, facecolor="white")
    axes = figure.add_axes((0.11, 0.15, 0.87, 0.69))  # letters of few sizes: laying out would cost more than drawing
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=8, labelcolor=PALE_INK, color=PALE_INK)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel("step", fontsize=8, color=PALE_INK)
    axes.set_ylabel(unit, fontsize=8, color=PALE_INK)
    for step in marks:
        axes.axvline(step, color="#888888", linewidth=0.9, linestyle=":")
    return figure, axes


def _name(axes: "Axes", names: Sequence[str]) -> None:
    """Say above the picture which colour is which."""
    from matplotlib.patches import Patch

    handles = [Patch(color=_COLOURS[i % len(_COLOURS)], label=name) for i, name in enumerate(names)]
    axes.figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.09, 1.01),
        ncols=4,
        fontsize=8,
        frameon=False,
        labelcolor=INK,
        handlelength=1.0,
        columnspacing=1.2,
    )


def _draw_not_finite(axes: "Axes", curve: Curve, colour: str) -> None:
    """A cross at the upper edge for every value that is no finite number."""
    steps = [s for s, v in zip(curve.steps, curve.values, strict=True) if not np.isfinite(v)]
    axes.plot(
        steps, [0.98] * len(steps), "x", color=colour, transform=axes.get_xaxis_transform(), markersize=5, clip_on=False
    )


def _finite(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    return array[np.isfinite(array)]


def _thinned(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points, each the mean of equally many neighbours; what is not finite leaves a gap."""
    steps, values = np.asarray(curve.steps, dtype=float), np.asarray(curve.values, dtype=float)
    values = np.where(np.isfinite(values), values, np.nan)
    size = -(-len(steps) // _MOST_POINTS) or 1
    if size == 1:
        return steps, values
    edges = np.arange(0, len(steps), size)
    counts = np.diff(np.append(edges, len(steps)))
    return np.add.reduceat(steps, edges) / counts, np.add.reduceat(values, edges) / counts


def parts(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> list[Curve]:
    """Curves by their names, without those that have no point."""
    return [Curve(name, steps, values) for name, (steps, values) in curves.items() if len(steps)]
