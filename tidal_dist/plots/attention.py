"""Attention weights by layer and head. Sizes are in inches, y downwards. T token slots, C char slots, N = T + C."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_pipeline.layout import Slots
from data_pipeline.reading import block_starts
from tidal_dist.model.maps import LayerMap
from tidal_dist.plots.canvas import (
    INK,
    MARGIN,
    POINT,
    TITLE,
    WIDTH,
    draw_name,
    draw_text,
    draw_title,
    empty_figure,
    name_width,
    shown,
)
from tidal_dist.plots.scale import Scale
from tidal_dist.plots.window import Window, window_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_TOKENS, _MOST_CHARS = 64, 96
_MOST_LAYERS, _MOST_HEADS = 8, 8
_PANEL_WIDTH = 1.75  # least width of a head's share of the figure
_CELL = 0.17  # largest cell
_LEAST_NAMED_CELL = 0.085  # names beside smaller cells could not be read
_GAP = 0.14
_LABEL = 0.22  # a line that says which layer, head or stream it is
_UNSEEN = (0.9, 0.9, 0.9)
_SCALE = Scale("Blues", 1.0, (0.0, 0.01, 0.1, 0.3, 0.6, 1.0), gamma=0.5)


def attention_figure(maps: Sequence[LayerMap], tokens: Slots, chars: Slots, names: Callable[[int], str]) -> "Figure":
    """One panel for each layer and head: what the chars attend to, or the tokens in layers that chars do not pass.

    Args:
        maps: of all layers. tokens: Slots of shape (T,), numpy arrays or tensors on the CPU. chars: of shape (C,).
        names: a readable name of an id.
    """
    tokens, chars = tokens.map(np.asarray), chars.map(np.asarray)
    window = window_of(tokens, chars, _MOST_TOKENS, _MOST_CHARS)
    tokens, chars = tokens.at(window.tokens), chars.at(window.chars)
    axis_of_tokens, axis_of_chars = (_Axis.of(slots, names) for slots in (tokens, chars))
    n_heads = min(maps[0].n_heads, _MOST_HEADS)
    width = max(WIDTH, 1.0 + n_heads * _PANEL_WIDTH)
    rows = [_Row.of(layer_map, axis_of_tokens, axis_of_chars, window) for layer_map in _evenly(maps, _MOST_LAYERS)]
    page = _Page(rows, n_heads, width)
    figure, axes = empty_figure(width, page.height)
    draw_title(axes, MARGIN, MARGIN, "Attention by layer and head", _explanation(maps, rows, n_heads, window))
    page.draw(axes)
    return figure


def _explanation(maps: Sequence[LayerMap], rows: "Sequence[_Row]", n_heads: int, window: Window) -> str:
    parts = ["each row shares its attention, 1 in all, among the columns; grey may not be seen"]
    if window.note:
        parts.append(window.note)
    if len(rows) < len(maps):
        parts.append(f"{len(rows)} of {len(maps)} layers")
    if n_heads < maps[0].n_heads:
        parts.append(f"heads 0..{n_heads - 1} of {maps[0].n_heads}")
    return "; ".join(parts)


def _evenly(maps: Sequence[LayerMap], most: int) -> list[LayerMap]:
    """At most `most` layers at even distances, the first and the last included."""
    chosen = np.linspace(0, len(maps) - 1, min(len(maps), most)).round().astype(int)
    return [maps[i] for i in chosen]


@dataclass(frozen=True)
class _Axis:
    """The slots of one stream along an edge of a panel: their names, and those that a block begins with."""

    stream: str
    names: list[str]
    starts: list[int]

    @classmethod
    def of(cls, slots: Slots, names: Callable[[int], str]) -> "_Axis":
        return cls(f"{slots.stream}s", [shown(names(int(i))) for i in slots.ids], block_starts(slots).tolist())


@dataclass(frozen=True)
class _Row:
    """The panels of one layer.

    Attributes:
        queries: the stream that asks. keys: the streams that are asked, side by side.
        parts: of the weights that the layer's map gives, the rows and columns that are drawn.
    """

    layer_map: LayerMap
    queries: _Axis
    keys: list[_Axis]
    parts: tuple[slice, np.ndarray]

    @classmethod
    def of(cls, layer_map: LayerMap, tokens: _Axis, chars: _Axis, window: Window) -> "_Row":
        columns = np.arange(window.tokens.start, window.tokens.stop)
        if not layer_map.has_chars:
            return cls(layer_map, tokens, [tokens], (window.tokens, columns))
        of_chars = layer_map.n_tokens + np.arange(window.chars.start, window.chars.stop)
        return cls(layer_map, chars, [tokens, chars], (window.chars, np.concatenate([columns, of_chars])))

    @property
    def n_queries(self) -> int:
        return len(self.queries.names)

    @property
    def n_keys(self) -> int:
        return sum(len(axis.names) for axis in self.keys)

    @property
    def key_names(self) -> list[str]:
        return [name for axis in self.keys for name in axis.names]

    def weights(self, head: int) -> np.ndarray:
        """(queries, keys) of one head."""
        rows, columns = self.parts
        keys = torch.from_numpy(columns)
        if self.layer_map.has_chars:
            return self.layer_map.of_chars(head, keys, first=rows.stop).numpy()[rows]
        return self.layer_map.of_tokens(head, keys).numpy()[rows]


@dataclass(frozen=True)
class _Page:
    """Where everything stands: layers one below the other, heads side by side."""

    rows: list[_Row]
    n_heads: int
    width: float

    @property
    def cell(self) -> float:
        room = (self.width - 2 * MARGIN - _LABEL - 0.6) / self.n_heads - _GAP
        return min(_CELL, room / max(row.n_keys for row in self.rows))

    @property
    def font_size(self) -> float:
        """Of the names; 0 where there is no room for any."""
        return min(6.5, 0.85 * self.cell / POINT) if self.cell >= _LEAST_NAMED_CELL else 0.0

    def _names_width(self, names: list[str]) -> float:
        return max([name_width(name, self.font_size) for name in names], default=0.0) + 0.08

    @property
    def left(self) -> float:
        """Where the first head's panels begin."""
        return MARGIN + 2 * _LABEL + max(self._names_width(row.queries.names) for row in self.rows)

    def _above(self, i: int) -> float:
        """Height over a layer's panels: key names where the layer above has others."""
        is_first_of_kind = i == 0 or len(self.rows[i - 1].keys) != len(self.rows[i].keys)
        return _LABEL + self._names_width(self.rows[i].key_names) if is_first_of_kind else 0.0

    @property
    def height(self) -> float:
        panels = sum(self._above(i) + row.n_queries * self.cell + _GAP for i, row in enumerate(self.rows))
        return MARGIN + TITLE + _LABEL + panels + _SCALE.height + MARGIN

    def draw(self, axes: "Axes") -> None:
        """Draw all panels, their names and the scale."""
        top = MARGIN + TITLE + _LABEL
        for i, row in enumerate(self.rows):
            above = self._above(i)
            top += above
            self._draw_query_names(axes, row, top)
            for head in range(self.n_heads):
                left = self.left + head * (max(r.n_keys for r in self.rows) * self.cell + _GAP)
                if i == 0:
                    middle = left + row.n_keys * self.cell / 2
                    draw_text(axes, middle, MARGIN + TITLE + _LABEL / 2, f"head {head}", 8, color=INK)
                self._draw_panel(axes, row, head, left, top)
                if above:
                    self._draw_key_names(axes, row, left, top)
            top += row.n_queries * self.cell + _GAP
        _SCALE.draw(axes, MARGIN, top, "attention weight")

    def _draw_panel(self, axes: "Axes", row: _Row, head: int, left: float, top: float) -> None:
        weights = row.weights(head)
        image = np.where(weights[..., None] > 0, _SCALE.colours(weights), np.array(_UNSEEN))
        right, bottom = left + row.n_keys * self.cell, top + row.n_queries * self.cell
        axes.imshow(image, extent=(left, right, bottom, top), interpolation="nearest", aspect="auto", zorder=1)
        self._draw_borders(axes, row, left, top)

    def _draw_borders(self, axes: "Axes", row: _Row, left: float, top: float) -> None:
        """Thin lines between blocks, thicker ones around the streams."""
        right, bottom = left + row.n_keys * self.cell, top + row.n_queries * self.cell
        thin: dict[str, Any] = {"color": "#909090", "linewidth": min(0.5, 4 * self.cell), "zorder": 2}
        edge: dict[str, Any] = {"color": INK, "linewidth": 0.8, "zorder": 2}
        axes.hlines([top + start * self.cell for start in row.queries.starts], left, right, **thin)
        x = left
        for axis in row.keys:
            axes.vlines([x + start * self.cell for start in axis.starts], top, bottom, **thin)
            axes.vlines(x, top, bottom, **edge)
            x += len(axis.names) * self.cell
        axes.vlines(right, top, bottom, **edge)
        axes.hlines([top, bottom], left, right, **edge)

    def _draw_query_names(self, axes: "Axes", row: _Row, top: float) -> None:
        middle = top + row.n_queries * self.cell / 2
        label = f"layer {row.layer_map.layer}"
        draw_text(axes, MARGIN + _LABEL / 2, middle, label, 8, rotation=90, va="center", color=INK)
        draw_text(axes, MARGIN + 1.4 * _LABEL, middle, row.queries.stream, 7, rotation=90, va="center")
        for i, name in enumerate(row.queries.names if self.font_size else []):
            draw_name(axes, self.left - 0.05, top + (i + 0.5) * self.cell, name, self.font_size, ha="right")

    def _draw_key_names(self, axes: "Axes", row: _Row, left: float, top: float) -> None:
        before = 0
        for axis in row.keys:
            middle = left + (before + len(axis.names) / 2) * self.cell
            draw_text(axes, middle, top - self._names_width(row.key_names) - _LABEL / 2, axis.stream, 7)
            before += len(axis.names)
        for i, name in enumerate(row.key_names if self.font_size else []):
            x = left + (i + 0.5) * self.cell
            draw_name(axes, x, top - 0.05, name, self.font_size, va="bottom", rotation=90)
