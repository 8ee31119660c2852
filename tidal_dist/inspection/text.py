"""A document's report for a terminal: tables, and the text with the loss of its characters as colour."""

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple, TextIO

from data_pipeline.reading import columns

_WIDTH = 100  # cells of a line of the text
_EDGES = (0.1, 0.5, 1.0, 2.0, 4.0)  # nats: the lower edges of the levels from 1
_LEVELS = ("<0.1", "<0.5", "<1", "<2", "<4", "≥4")
_BACKGROUNDS = (194, 229, 222, 215, 209, 203)  # ANSI 256 colours from pale green over yellow to red, one a level
_DIGITS = (".", "1", "2", "3", "4", "5")  # where there is no colour
_MARKS = {"<eob>": "⏎", "<eos>": "■"}
_NOTE = "nats; ⏎ (<eob>) and ■ (<eos>) stand before the block they end, which is written from its end"
_SHARES = {
    "layer": "layer",
    "head": "head",
    "bos": "<bos>",
    "last": "token before the block",
    "others": "other tokens",
    "own": "own chars",
}


class _Cell(NamedTuple):
    """What stands for one character: its level of loss, or None in a prompt."""

    text: str
    level: int | None
    ends_line: bool = False


def wants_colour(stream: TextIO) -> bool:
    """Whether colours belong there: a terminal, and nobody has set NO_COLOR (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def as_text(report: dict[str, Any], colour: bool) -> str:
    """The report of `as_object` as tables, with the text in between if a model has read it."""
    parts = [
        report["title"],
        _table("blocks", _escaped(report["blocks"])),
        _table("tokens", _escaped(report["tokens"])),
        _table("chars", _escaped(_char_columns(report["chars"]))),
    ]
    if "loss" in report:
        parts += [_text(report, colour), _loss_line(report["loss"]), _attention(report["attention"])]
    return "\n\n".join(parts)


def _char_columns(chars: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The columns of the char stream; with scores, each of the likeliest chars in a column with its probability."""
    if "nats" not in chars:
        return chars
    shown = {name: values for name, values in chars.items() if not name.startswith("alternatives")}
    shown["nats"] = [f"{nats + 0:.3f}" for nats in chars["nats"]]
    shown["p"] = [f"{p:.1%}" for p in chars["p"]]
    for i, name in enumerate(("1st", "2nd", "3rd")):
        pairs = zip(chars["alternatives"], chars["alternatives_p"], strict=True)
        shown[name] = [f"{_visible(texts[i])} {p[i]:.1%}" for texts, p in pairs]
    return shown


def _escaped(table: dict[str, list[Any]]) -> dict[str, list[str]]:
    names = ("name", "label", "text")
    return {key: [_visible(v) if key in names else str(v) for v in values] for key, values in table.items()}


def _visible(text: str) -> str:
    """Text without white space or anything that a terminal would obey."""
    return "".join("␣" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in text)


def _table(title: str, table: dict[str, list[str]]) -> str:
    rows = [list(table), *(list(row) for row in zip(*table.values(), strict=True))]
    widths = [max(columns(row[i]) for row in rows) for i in range(len(table))]
    lines = ["  ".join(_right(cell, width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([f"{title} ({len(rows) - 1})", *lines])


def _right(cell: str, width: int) -> str:
    return " " * (width - columns(cell)) + cell


def _text(report: dict[str, Any], colour: bool) -> str:
    """Prompt and text in reading order, with a legend; levels are colours, or digits under each line."""
    draw = _coloured if colour else _with_digits
    legend = [_Cell(text, level) for level, text in enumerate(_LEVELS)]
    if colour:
        shown = " ".join(_coloured([_Cell(f" {cell.text} ", cell.level)]) for cell in legend)
    else:
        shown = "  ".join(f"{_DIGITS[level]} {text}" for level, text in enumerate(_LEVELS))
    return "\n".join(["loss", *map(draw, _lines(_cells(report))), f"{shown} {_NOTE}"])


def _cells(report: dict[str, Any]) -> Iterator[_Cell]:
    blocks, characters = report["blocks"], report["characters"]
    for text, part in zip(blocks["text"], blocks["part"], strict=True):
        if part == "prompt":
            yield from (_cell_of(c, None) for c in text)
    for text, is_end, nats in zip(characters["text"], characters["is_end"], characters["nats"], strict=True):
        level = bisect_right(_EDGES, nats)
        yield _Cell(_MARKS[text], level) if is_end else _cell_of(text, level)


def _cell_of(c: str, level: int | None) -> _Cell:
    if c == "\n":
        return _Cell("↵", level, ends_line=True)
    return _Cell(c if c.isprintable() else repr(c)[1:-1], level)


def _lines(cells: Iterable[_Cell]) -> Iterator[list[_Cell]]:
    """Cells in lines, broken after a line end and where a line is full."""
    line: list[_Cell] = []
    used = 0
    for cell in cells:
        if line and (line[-1].ends_line or used + columns(cell.text) > _WIDTH):
            yield line
            line, used = [], 0
        line.append(cell)
        used += columns(cell.text)
    if line:
        yield line


def _coloured(line: Sequence[_Cell]) -> str:
    parts = []
    for level, cells in groupby(line, key=lambda cell: cell.level):
        text = "".join(cell.text for cell in cells)
        parts.append(text if level is None else f"\x1b[38;5;16;48;5;{_BACKGROUNDS[level]}m{text}\x1b[0m")
    return "".join(parts)


def _with_digits(line: Sequence[_Cell]) -> str:
    digits = [(" " if cell.level is None else _DIGITS[cell.level]) * columns(cell.text) for cell in line]
    return "".join(cell.text for cell in line) + "\n" + "".join(digits)


def _loss_line(loss: dict[str, float]) -> str:
    nats, labels, size = loss["nats"], loss["labels"], loss["text_bytes"]
    return f"{loss['bits_per_byte']:.4f} bits per byte: {nats:.4f} nats of {labels} labels over {size} bytes"


def _attention(shares: dict[str, list[Any]]) -> str:
    rounded = {key: [f"{v:.1%}" if isinstance(v, float) else str(v) for v in values] for key, values in shares.items()}
    return _table("attention of the chars by head", {name: rounded[key] for key, name in _SHARES.items()})
