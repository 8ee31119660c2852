"""What all pictures share: an empty page, texts, lines of boxes, colours of blocks, names that a font can draw.

All sizes are in inches; the figure is one coordinate system, x to the right and y downwards.
"""

import io
import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.files import replace_file
from data_pipeline.layout import NO_DOCUMENT, Slots
from data_pipeline.reading import columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 160
WIDTH = 9.0  # of a full figure; a README shows it about 900 pixels wide
MARGIN = 0.15
BOX = 0.28  # least width of a box, and its height
BOX_FONT = 7.0
TITLE = 0.52  # a title and the line that explains it
POINT = 1 / 72
LETTER = 0.602  # width of a letter of the font, in its size
_BLOCK_GAP = 0.06

_FONT = "DejaVu Sans Mono"  # comes with matplotlib
# Whichever of them the machine has draws what the first lacks.
_OTHER_FONTS = (
    "Noto Sans Mono CJK SC",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "PingFang HK",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
)

_BLOCK_COLOURS = ("#9ecae9", "#ffbf79", "#a3d9a5", "#f4a6a3", "#cbb3e3", "#d8b6a4", "#f5b8d8", "#d9d98b", "#9fdfdf")
_NO_BLOCK_COLOUR, _PADDING_COLOUR = "#d0d0d0", "#f2f2f2"
UNSEEN_COLOUR = "#fafafa"
INK, PALE_INK = "#202020", "#6a6a6a"
THICK_LINE: dict[str, Any] = {"color": INK, "linewidth": 1.4, "zorder": 2}
THIN_LINE: dict[str, Any] = {"color": "#a0a0a0", "linewidth": 0.5, "zorder": 2}
_DARK = 0.4  # lightness of the colours that only white ink can be read on
_SHOWN_AS = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}

Line = list[tuple[int, float, float]]  # boxes from left to right: number, x, width


def empty_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """A white page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def to_png(figure: "Figure") -> bytes:
    """The figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def save(figure: "Figure", path: str | Path) -> None:
    """Write the figure as a PNG that appears whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    replace_file(Path(path), to_png(figure))


def draw_text(axes: "Axes", x: float, y: float, text: str, size: float, **style: Any) -> None:
    """Pale, centred text of `size` points unless `style` says otherwise; a dollar sign is one, not mathematics."""
    usual: dict[str, Any] = {"color": PALE_INK, "ha": "center", "va": "center_baseline", "parse_math": False}
    axes.text(x, y, text, fontsize=size, zorder=3, **(usual | style))


def draw_name(axes: "Axes", x: float, y: float, name: str, size: float, **style: Any) -> None:
    """A name in the font of fixed width."""
    draw_text(axes, x, y, name, size, **({"family": list(_fonts()), "color": INK} | style))


def draw_title(axes: "Axes", left: float, top: float, title: str, explanation: str) -> None:
    """A title and the line that explains it; `TITLE` high."""
    draw_text(axes, left, top + 0.12, title, 10, ha="left", weight="bold", color=INK)
    draw_text(axes, left, top + 0.31, explanation, 7.5, ha="left")


def draw_box(axes: "Axes", left: float, top: float, width: float, name: str, colour: Any) -> None:
    """A box `BOX` high with a name in it."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, top), width, BOX, facecolor=colour, edgecolor="#808080", linewidth=0.6))
    ink = INK if _lightness(colour) > _DARK else "white"
    draw_name(axes, left + width / 2, top + BOX / 2, name, BOX_FONT, color=ink)


def _lightness(colour: Any) -> float:
    """From 0, black, to 1, white."""
    from matplotlib.colors import to_rgb

    return float(np.dot(to_rgb(colour), (0.299, 0.587, 0.114)))


def box_width(name: str) -> float:
    """Width of the box around a name."""
    return max(BOX, name_width(name + " ", BOX_FONT))


def name_width(name: str, size: float) -> float:
    """Width of a name in the font of fixed width, of `size` points."""
    return columns(name) * LETTER * size * POINT


def lines_of_boxes(
    widths: Sequence[float], starts: Collection[int], left: float, breaks: Collection[int] = ()
) -> list[Line]:
    """Boxes of these widths, line after line within the figure's width; a block is parted only if no line holds it.

    Args:
        starts: boxes that a block begins with; a gap stands before them. left: where a line begins.
        breaks: boxes that end a line.
    """
    lines: list[Line] = [[]] if len(widths) else []
    room = WIDTH - 2 * MARGIN - left
    x = left
    for i, width in enumerate(widths):
        gap = _BLOCK_GAP if i in starts and lines[-1] else 0.0
        ahead = _width_of_block(widths, i, starts) if i in starts else width
        is_full = x + gap + (ahead if ahead <= room else width) > left + room
        if lines[-1] and (is_full or i - 1 in breaks):
            lines.append([])
            x, gap = left, 0.0
        lines[-1].append((i, x + gap, width))
        x += gap + width
    return lines


def _width_of_block(widths: Sequence[float], first: int, starts: Collection[int]) -> float:
    end = next((i for i in range(first + 1, len(widths)) if i in starts), len(widths))
    return sum(widths[first:end])


def block_colours(slots: Slots) -> list[str]:
    """Each slot's colour: the same for a block in both streams, another for the block before and after."""
    colours = []
    for document, block in zip(slots.document.tolist(), slots.block.tolist(), strict=True):
        of_block = _BLOCK_COLOURS[(block + 4 * (document - 1)) % len(_BLOCK_COLOURS)]
        colours.append(_PADDING_COLOUR if document == NO_DOCUMENT else _NO_BLOCK_COLOUR if block < 0 else of_block)
    return colours


def shown(name: str) -> str:
    """A name with visible white space; what the fonts lack, and bytes that are no text, as hexadecimal bytes."""
    name = re.sub(r"\\x([0-9a-f]{2})", lambda match: match[1].upper(), name)
    return "".join(_SHOWN_AS.get(c, c) if _can_draw(_SHOWN_AS.get(c, c)) else c.encode().hex().upper() for c in name)


@lru_cache(maxsize=1)
def _fonts() -> tuple[str, ...]:
    """The font of all names, and what the machine has to help it out."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return (_FONT, *(name for name in _OTHER_FONTS if name in installed))


@lru_cache(maxsize=4096)
def _can_draw(character: str) -> bool:
    from matplotlib import font_manager

    fonts = (font_manager.get_font(font_manager.findfont(name)) for name in _fonts())
    return character.isprintable() and any(font.get_char_index(ord(character)) != 0 for font in fonts)
