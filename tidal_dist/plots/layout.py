"""The two streams of a row, and who sees whom in it. Sizes are in inches, y downwards."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.layout import IGNORED, NO_DOCUMENT, NO_PLACE, Slots, TokenAttention, may_see
from data_pipeline.reading import block_starts, columns
from tidal_dist.plots.canvas import (
    BOX,
    LETTER,
    MARGIN,
    POINT,
    THICK_LINE,
    THIN_LINE,
    TITLE,
    UNSEEN_COLOUR,
    WIDTH,
    Line,
    block_colours,
    box_width,
    draw_box,
    draw_name,
    draw_text,
    draw_title,
    empty_figure,
    lines_of_boxes,
    name_width,
    shown,
)
from tidal_dist.plots.window import window_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEADING = 0.7  # left of a stream, for the names of its lines
_TEXT_WIDTH = 4.1  # of the longest line of explanation
_LINE_GAP = 0.14  # between two lines of one stream
_SMALL = 0.15  # height of a line of small print
_NOTES = (
    "position: where a slot stands in the document, for the positional encoding",
    "place: bytes to the end of its block, from 1; of a char, those of the byte it predicts",
)
_CELL = 0.27  # largest cell of the matrix
_MOST_TOKENS, _MOST_CHARS = 96, 160  # more could not be read in the matrix


def layout_figure(
    tokens: Slots,
    chars: Slots,
    labels: Any,
    names: Callable[[int], str],
    token_attention: TokenAttention,
) -> "Figure":
    """The two streams of one row, and who sees whom in it; of a long row its first blocks.

    Args:
        tokens: Slots of shape (T,), numpy arrays or tensors on the CPU. chars: Slots of shape (C,).
        labels: (C,) what each char slot predicts; -100 for nothing.
        names: a readable name of an id (`MixedTokenizer.name`); white space and what the font lacks are replaced.
        token_attention: "block" or "causal".

    Raises:
        ValueError: the streams are a batch, not one row.
    """
    tokens, chars, labels = tokens.map(np.asarray), chars.map(np.asarray), np.asarray(labels)
    if tokens.ids.ndim != 1 or chars.ids.ndim != 1:
        raise ValueError(f"one row is drawn, not a batch: ids have shapes {tokens.ids.shape} and {chars.ids.shape}")
    window = window_of(tokens, chars, _MOST_TOKENS, _MOST_CHARS)
    tokens, chars, labels = tokens.at(window.tokens), chars.at(window.chars), labels[window.chars]
    token_names, char_names = ([shown(names(int(i))) for i in slots.ids] for slots in (tokens, chars))
    label_names = ["" if i == IGNORED else shown(names(int(i))) for i in labels]
    streams = (_token_stream(tokens, token_names, window.note), _char_stream(chars, char_names, label_names))
    return _arranged(streams, Matrix.of(tokens, chars, [*token_names, *char_names], token_attention))


def _arranged(streams: "tuple[_Stream, _Stream]", matrix: "Matrix") -> "Figure":
    """Streams and notes on the left; the matrix beside them where there is room, else below."""
    left_width = max(_TEXT_WIDTH, *(stream.width for stream in streams)) + 0.25
    left_height = sum(stream.height for stream in streams) + len(_NOTES) * _SMALL + 0.3
    beside = left_width + matrix.width + 2 * MARGIN <= WIDTH
    width = left_width + matrix.width if beside else max(left_width, matrix.width)
    height = max(left_height, matrix.height) if beside else left_height + matrix.height
    figure, axes = empty_figure(width + 2 * MARGIN, height + 2 * MARGIN)
    top = MARGIN
    for stream in streams:
        stream.draw(axes, MARGIN, top)
        top += stream.height
    for i, note in enumerate(_NOTES):
        draw_text(axes, MARGIN, top + 0.1 + i * _SMALL, note, 7, ha="left")
    matrix.draw(axes, *((MARGIN + left_width, MARGIN) if beside else (MARGIN, MARGIN + left_height)))
    return figure


@dataclass(frozen=True)
class _Stream:
    """One stream as lines of boxes: a row of boxes for each of `boxes`, then the numbers in small print.

    Attributes:
        boxes: heading of a row of boxes, and the name and colour of every slot in it.
    """

    title: str
    explanation: str
    slots: Slots
    boxes: list[tuple[str, list[str], list[str]]]

    @cached_property
    def lines(self) -> list[Line]:
        widths = [max(map(box_width, names)) for names in zip(*(names for _, names, _ in self.boxes), strict=True)]
        return lines_of_boxes(widths, set(block_starts(self.slots).tolist()), _HEADING)

    @property
    def width(self) -> float:
        return max([x + width for line in self.lines for _, x, width in line], default=0.0)

    @property
    def height(self) -> float:
        return TITLE + len(self.lines) * (len(self.boxes) * BOX + 2 * _SMALL + _LINE_GAP)

    def draw(self, axes: "Axes", left: float, top: float) -> None:
        draw_title(axes, left, top, self.title, self.explanation)
        top += TITLE
        for line in self.lines:
            for heading, names, colours in self.boxes:
                draw_text(axes, left + _HEADING - 0.1, top + BOX / 2, heading, 7, ha="right")
                for i, x, width in line:
                    draw_box(axes, left + x, top, width, names[i], colours[i])
                top += BOX
            top = _draw_numbers(axes, left, top, line, self.slots)


def _token_stream(tokens: Slots, names: list[str], note: str) -> _Stream:
    explanation = "read, never predicted; the last block is left out: nothing reads it" + (note and f"; {note}")
    return _Stream("Token stream", explanation, tokens, [("input", names, block_colours(tokens))])


def _char_stream(chars: Slots, names: list[str], label_names: list[str]) -> _Stream:
    explanation = "each block is written from its end, byte by byte; one colour, one block"
    boxes = [("input", names, block_colours(chars)), ("predicts", label_names, ["white"] * len(names))]
    return _Stream("Char stream", explanation, chars, boxes)


def _draw_numbers(axes: "Axes", left: float, top: float, line: Line, slots: Slots) -> float:
    """Positions and places of a line's slots, in small print; returns where the next line starts."""
    for heading, values, none in (("position", slots.position, None), ("place", slots.place, NO_PLACE)):
        middle = top + _SMALL / 2 + 0.02
        draw_text(axes, left + _HEADING - 0.1, middle, heading, 7, ha="right")
        for i, x, width in line:
            has_none = slots.document[i] == NO_DOCUMENT or values[i] == none
            draw_text(axes, left + x + width / 2, middle, "–" if has_none else str(values[i]), 6)
        top += _SMALL
    return top + _LINE_GAP


@dataclass(frozen=True)
class Matrix:
    """Who sees whom: a query in each row, a key in each column, tokens before chars."""

    visible: np.ndarray
    names: list[str]
    colours: list[str]
    n_tokens: int
    borders: np.ndarray

    @classmethod
    def of(cls, tokens: Slots, chars: Slots, names: list[str], token_attention: TokenAttention) -> "Matrix":
        """The matrix of one row; `names`: of its tokens, then of its chars."""
        streams = (tokens, chars)
        visible = np.block([[may_see(q.queries(), k.keys(), token_attention) for k in streams] for q in streams])
        n_tokens = len(tokens.ids)
        borders = np.concatenate([block_starts(tokens), n_tokens + block_starts(chars)])
        return cls(visible, names, block_colours(tokens) + block_colours(chars), n_tokens, borders)

    @property
    def cell(self) -> float:
        """Width of a cell."""
        return min(_CELL, (WIDTH - self._names_width - 0.35) / max(len(self.names), 12))

    @property
    def width(self) -> float:
        """Width, names included."""
        return self._names_width + max(self.cell * len(self.names), 3.0) + 0.05

    @property
    def height(self) -> float:
        """Height, title and names included."""
        return TITLE + self._names_width + self.cell * len(self.names) + 0.05

    @property
    def _font_size(self) -> float:
        # `cell` asks for the width of the names: their size follows from the number of slots alone.
        return min(7.5, 0.8 * (WIDTH - 1.2) / max(len(self.names), 12) / POINT)

    @property
    def _names_width(self) -> float:
        return 0.35 + max(map(columns, self.names)) * LETTER * self._font_size * POINT

    def draw(self, axes: "Axes", left: float, top: float) -> None:
        """Draw it with its title, its names left of it and above."""
        draw_title(axes, left, top, "Who sees whom", "the slot of a row attends to the coloured slots of the columns")
        left, top = left + self._names_width, top + TITLE + self._names_width
        self._draw_cells(axes, left, top)
        self._draw_borders(axes, left, top)
        self._draw_names(axes, left, top)

    def _draw_cells(self, axes: "Axes", left: float, top: float) -> None:
        from matplotlib.colors import to_rgb

        side = self.cell * len(self.names)
        key_colours = np.array([to_rgb(colour) for colour in self.colours])
        image = np.where(self.visible[..., None], key_colours[None], np.array(to_rgb(UNSEEN_COLOUR)))
        extent = (left, left + side, top + side, top)
        axes.imshow(image, extent=extent, interpolation="nearest", aspect="auto", zorder=1)
        n = self.n_tokens
        if n < len(self.names) and not self.visible[:n, n:].any():
            x, y = left + (n + len(self.names)) / 2 * self.cell, top + n / 2 * self.cell
            draw_text(axes, x, y, "never", 8, bbox={"facecolor": UNSEEN_COLOUR, "edgecolor": "none", "pad": 1.5})

    def _draw_borders(self, axes: "Axes", left: float, top: float) -> None:
        n, cell = len(self.names), self.cell
        for i in [*self.borders.tolist(), n]:
            line = THICK_LINE if i in (0, self.n_tokens, n) else THIN_LINE
            axes.plot([left, left + n * cell], [top + i * cell] * 2, **line)
            axes.plot([left + i * cell] * 2, [top, top + n * cell], **line)

    def _draw_names(self, axes: "Axes", left: float, top: float) -> None:
        size, cell = self._font_size, self.cell
        for i, name in enumerate(self.names):
            middle = (i + 0.5) * cell
            draw_name(axes, left - 0.05, top + middle, name, size, ha="right")
            rotation = 0 if name_width(name + " ", size) < cell else 90
            draw_name(axes, left + middle, top - 0.07, name, size, va="bottom", rotation=rotation)
        outer = self._names_width - 0.1
        for label, first, end in (("tokens", 0, self.n_tokens), ("chars", self.n_tokens, len(self.names))):
            middle = (first + end) / 2 * cell
            if first < end:
                draw_text(axes, left + middle, top - outer, label, 8)
                draw_text(axes, left - outer, top + middle, label, 8, va="center", rotation=90)
