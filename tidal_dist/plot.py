"""Pictures for people who would rather look than read: the two streams of a row, and who sees whom in it.

All sizes are in inches; the figure is one coordinate system, x to the right and y downwards.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.files import whole_file
from data_pipeline.layout import (
    IGNORED,
    NO_DOCUMENT,
    NO_PLACE,
    Slots,
    TokenAttention,
    may_see,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 160
_WIDTH = 9.0  # of a full figure; a README shows it about 900 pixels wide
_MARGIN = 0.15
_HEADING = 0.7  # left of a stream, for the names of its lines
_BOX = 0.28  # least width of a box, and its height
_BOX_FONT = 7.0
_TEXT_WIDTH = 4.1  # of the longest line of explanation
_BLOCK_GAP = 0.06
_LINE_GAP = 0.14  # between two lines of one stream
_SMALL = 0.15  # height of a line of small print
_TITLE = 0.52  # a title and the line that explains it
_NOTES = (
    "position: where a slot stands in the document, for the positional encoding",
    "place: bytes to the end of its block, from 1; of a char, those of the byte it predicts",
)
_CELL = 0.27  # largest cell of the matrix
_FONT = "DejaVu Sans Mono"  # comes with matplotlib
_LETTER = 0.602  # width of a letter of the font, in its size
_POINT = 1 / 72

_BLOCK_COLOURS = ("#9ecae9", "#ffbf79", "#a3d9a5", "#f4a6a3", "#cbb3e3", "#d8b6a4", "#f5b8d8", "#d9d98b", "#9fdfdf")
_NO_BLOCK_COLOUR, _PADDING_COLOUR, _UNSEEN_COLOUR = "#d0d0d0", "#f2f2f2", "#fafafa"
_INK, _PALE_INK = "#202020", "#6a6a6a"
_THICK_LINE: dict[str, Any] = {"color": _INK, "linewidth": 1.4, "zorder": 2}
_THIN_LINE: dict[str, Any] = {"color": "#a0a0a0", "linewidth": 0.5, "zorder": 2}
_SHOWN_AS = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}


def plot_layout(
    tokens: Slots,
    chars: Slots,
    labels: Any,
    names: Callable[[int], str],
    token_attention: TokenAttention,
    path: str | Path,
) -> None:
    """Draw the two streams of one row, and who sees whom in it, as a PNG that appears whole or not at all.

    Args:
        tokens: Slots of shape (T,), numpy arrays or tensors on the CPU. chars: Slots of shape (C,).
        labels: (C,) what each char slot predicts; -100 for nothing.
        names: a readable name of an id (`MixedTokenizer.name`); white space and what the font lacks are replaced.
        token_attention: "block" or "causal".

    Raises:
        ValueError: the streams are a batch, not one row.
        UserError: the file cannot be written.
    """
    tokens, chars, labels = tokens.map(np.asarray), chars.map(np.asarray), np.asarray(labels)
    if tokens.ids.ndim != 1 or chars.ids.ndim != 1:
        raise ValueError(f"one row is drawn, not a batch: ids have shapes {tokens.ids.shape} and {chars.ids.shape}")
    token_names, char_names = ([_shown(names(int(i))) for i in slots.ids] for slots in (tokens, chars))
    label_names = ["" if i == IGNORED else _shown(names(int(i))) for i in labels]
    streams = (_token_stream(tokens, token_names), _char_stream(chars, char_names, label_names))
    matrix = _Matrix.of(tokens, chars, [*token_names, *char_names], token_attention)
    left_width = max(_TEXT_WIDTH, *(stream.width for stream in streams)) + 0.25
    left_height = sum(stream.height for stream in streams) + len(_NOTES) * _SMALL + 0.3
    beside = left_width + matrix.width + 2 * _MARGIN <= _WIDTH
    width = left_width + matrix.width if beside else max(left_width, matrix.width)
    height = max(left_height, matrix.height) if beside else left_height + matrix.height
    figure, axes = _empty_figure(width + 2 * _MARGIN, height + 2 * _MARGIN)
    top = _MARGIN
    for stream in streams:
        stream.draw(axes, _MARGIN, top)
        top += stream.height
    for i, note in enumerate(_NOTES):
        _text(axes, _MARGIN, top + 0.1 + i * _SMALL, note, 7, ha="left")
    matrix.draw(axes, *((_MARGIN + left_width, _MARGIN) if beside else (_MARGIN, _MARGIN + left_height)))
    with whole_file(Path(path)) as file:
        figure.savefig(file, format="png")


def _empty_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


_Line = list[tuple[int, float, float]]  # boxes from left to right: slot, x, width


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
    def lines(self) -> list[_Line]:
        widest = [max(names, key=len) for names in zip(*(names for _, names, _ in self.boxes), strict=True)]
        return _lines_of_boxes(widest, self.slots)

    @property
    def width(self) -> float:
        return max([x + width for line in self.lines for _, x, width in line], default=0.0)

    @property
    def height(self) -> float:
        return _TITLE + len(self.lines) * (len(self.boxes) * _BOX + 2 * _SMALL + _LINE_GAP)

    def draw(self, axes: "Axes", left: float, top: float) -> None:
        _title(axes, left, top, self.title, self.explanation)
        top += _TITLE
        for line in self.lines:
            for heading, names, colours in self.boxes:
                _draw_boxes(axes, left, top, heading, line, names, colours)
                top += _BOX
            top = _draw_numbers(axes, left, top, line, self.slots)


def _token_stream(tokens: Slots, names: list[str]) -> _Stream:
    explanation = "read, never predicted; the last block is left out: nothing reads it"
    return _Stream("Token stream", explanation, tokens, [("input", names, _colours(tokens))])


def _char_stream(chars: Slots, names: list[str], label_names: list[str]) -> _Stream:
    explanation = "each block is written from its end, byte by byte; one colour, one block"
    boxes = [("input", names, _colours(chars)), ("predicts", label_names, ["white"] * len(names))]
    return _Stream("Char stream", explanation, chars, boxes)


@dataclass(frozen=True)
class _Matrix:
    """Who sees whom: a query in each row, a key in each column, tokens before chars."""

    visible: np.ndarray
    names: list[str]
    colours: list[str]
    n_tokens: int
    borders: np.ndarray

    @classmethod
    def of(cls, tokens: Slots, chars: Slots, names: list[str], token_attention: TokenAttention) -> "_Matrix":
        streams = (tokens, chars)
        visible = np.block([[may_see(q.queries(), k.keys(), token_attention) for k in streams] for q in streams])
        n_tokens = len(tokens.ids)
        borders = np.concatenate([_block_starts(tokens), n_tokens + _block_starts(chars)])
        return cls(visible, names, _colours(tokens) + _colours(chars), n_tokens, borders)

    @property
    def cell(self) -> float:
        return min(_CELL, (_WIDTH - self._names_width - 0.35) / max(len(self.names), 12))

    @property
    def width(self) -> float:
        return self._names_width + max(self.cell * len(self.names), 3.0) + 0.05

    @property
    def height(self) -> float:
        return _TITLE + self._names_width + self.cell * len(self.names) + 0.05

    @property
    def _font_size(self) -> float:
        # `cell` asks for the width of the names: their size follows from the number of slots alone.
        return min(7.5, 0.8 * (_WIDTH - 1.2) / max(len(self.names), 12) / _POINT)

    @property
    def _names_width(self) -> float:
        return 0.35 + max(map(len, self.names)) * _LETTER * self._font_size * _POINT

    def draw(self, axes: "Axes", left: float, top: float) -> None:
        _title(axes, left, top, "Who sees whom", "the slot of a row attends to the coloured slots of the columns")
        left, top = left + self._names_width, top + _TITLE + self._names_width
        self._draw_cells(axes, left, top)
        self._draw_borders(axes, left, top)
        self._draw_names(axes, left, top)

    def _draw_cells(self, axes: "Axes", left: float, top: float) -> None:
        from matplotlib.colors import to_rgb

        side = self.cell * len(self.names)
        key_colours = np.array([to_rgb(colour) for colour in self.colours])
        image = np.where(self.visible[..., None], key_colours[None], np.array(to_rgb(_UNSEEN_COLOUR)))
        extent = (left, left + side, top + side, top)
        axes.imshow(image, extent=extent, interpolation="nearest", aspect="auto", zorder=1)
        n = self.n_tokens
        if n < len(self.names) and not self.visible[:n, n:].any():
            x, y = left + (n + len(self.names)) / 2 * self.cell, top + n / 2 * self.cell
            _text(axes, x, y, "never", 8, bbox={"facecolor": _UNSEEN_COLOUR, "edgecolor": "none", "pad": 1.5})

    def _draw_borders(self, axes: "Axes", left: float, top: float) -> None:
        n, cell = len(self.names), self.cell
        for i in [*self.borders.tolist(), n]:
            line = _THICK_LINE if i in (0, self.n_tokens, n) else _THIN_LINE
            axes.plot([left, left + n * cell], [top + i * cell] * 2, **line)
            axes.plot([left + i * cell] * 2, [top, top + n * cell], **line)

    def _draw_names(self, axes: "Axes", left: float, top: float) -> None:
        size, cell = self._font_size, self.cell
        for i, name in enumerate(self.names):
            middle = (i + 0.5) * cell
            is_short = (len(name) + 1) * _LETTER * size * _POINT < cell
            style: dict[str, Any] = {"family": _FONT, "color": _INK}
            _text(axes, left - 0.05, top + middle, name, size, ha="right", **style)
            rotation = 0 if is_short else 90
            _text(axes, left + middle, top - 0.07, name, size, va="bottom", rotation=rotation, **style)
        outer = self._names_width - 0.1
        for label, first, end in (("tokens", 0, self.n_tokens), ("chars", self.n_tokens, len(self.names))):
            middle = (first + end) / 2 * cell
            if first < end:
                _text(axes, left + middle, top - outer, label, 8)
                _text(axes, left - outer, top + middle, label, 8, va="center", rotation=90)


def _lines_of_boxes(names: Sequence[str], slots: Slots) -> list[_Line]:
    """One box for each slot, line after line, with a gap before each block."""
    starts = set(_block_starts(slots).tolist())
    lines: list[_Line] = [[]] if names else []
    x = _HEADING
    for i, name in enumerate(names):
        width = max(_BOX, (len(name) + 1) * _LETTER * _BOX_FONT * _POINT)
        gap = _BLOCK_GAP if i in starts and lines[-1] else 0.0
        if lines[-1] and x + gap + width > _WIDTH - 2 * _MARGIN:
            lines.append([])
            x, gap = _HEADING, 0.0
        lines[-1].append((i, x + gap, width))
        x += gap + width
    return lines


def _draw_boxes(
    axes: "Axes", left: float, top: float, heading: str, line: _Line, names: Sequence[str], colours: Sequence[str]
) -> None:
    from matplotlib.patches import Rectangle

    _text(axes, left + _HEADING - 0.1, top + _BOX / 2, heading, 7, ha="right")
    for i, x, width in line:
        box = Rectangle((left + x, top), width, _BOX, facecolor=colours[i], edgecolor="#808080", linewidth=0.6)
        axes.add_patch(box)
        _text(axes, left + x + width / 2, top + _BOX / 2, names[i], _BOX_FONT, family=_FONT, color=_INK)


def _draw_numbers(axes: "Axes", left: float, top: float, line: _Line, slots: Slots) -> float:
    """Positions and places of a line's slots, in small print; returns where the next line starts."""
    for heading, values, none in (("position", slots.position, None), ("place", slots.place, NO_PLACE)):
        middle = top + _SMALL / 2 + 0.02
        _text(axes, left + _HEADING - 0.1, middle, heading, 7, ha="right")
        for i, x, width in line:
            has_none = slots.document[i] == NO_DOCUMENT or values[i] == none
            _text(axes, left + x + width / 2, middle, "–" if has_none else str(values[i]), 6)
        top += _SMALL
    return top + _LINE_GAP


def _title(axes: "Axes", left: float, top: float, title: str, explanation: str) -> None:
    _text(axes, left, top + 0.12, title, 10, ha="left", weight="bold", color=_INK)
    _text(axes, left, top + 0.31, explanation, 7.5, ha="left")


def _text(axes: "Axes", x: float, y: float, text: str, size: float, **style: Any) -> None:
    """Pale, centred text of `size` points unless `style` says otherwise; a dollar sign is one, not mathematics."""
    usual: dict[str, Any] = {"color": _PALE_INK, "ha": "center", "va": "center_baseline", "parse_math": False}
    axes.text(x, y, text, fontsize=size, zorder=3, **(usual | style))


def _block_starts(slots: Slots) -> np.ndarray:
    """Slots whose block is not that of the slot before them, the first one included."""
    changes = (np.diff(slots.document) != 0) | (np.diff(slots.block) != 0)
    return np.concatenate([[0], np.flatnonzero(changes) + 1])[: len(slots.ids)]


def _colours(slots: Slots) -> list[str]:
    """Each slot's colour: the same for a block in both streams, another for the block before and after."""
    colours = []
    for document, block in zip(slots.document.tolist(), slots.block.tolist(), strict=True):
        of_block = _BLOCK_COLOURS[(block + 4 * (document - 1)) % len(_BLOCK_COLOURS)]
        colours.append(_PADDING_COLOUR if document == NO_DOCUMENT else _NO_BLOCK_COLOUR if block < 0 else of_block)
    return colours


def _shown(name: str) -> str:
    """A name with visible white space; what the font lacks, and bytes that are no text, as hexadecimal bytes."""
    name = re.sub(r"\\x([0-9a-f]{2})", lambda match: match[1].upper(), name)
    return "".join(_SHOWN_AS.get(c, c) if _can_draw(_SHOWN_AS.get(c, c)) else c.encode().hex().upper() for c in name)


@lru_cache(maxsize=4096)
def _can_draw(character: str) -> bool:
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(_FONT))
    return character.isprintable() and font.get_char_index(ord(character)) != 0
