"""A text on a terminal while it is written: what is finished stays, and behind it the block at hand grows from its end.

The cursor rests behind the finished text. The block at hand is drawn from there, or on the line below where it would
cross the margin, and the cursor goes back; so nothing has to know where on the screen the text stands.
"""

import unicodedata
from collections.abc import Callable
from typing import TextIO

from data_pipeline.reading import columns
from tidal_dist.generation.events import Block, Char, Event

_DIM, _AT_HAND, _PLAIN = "\x1b[2m", "\x1b[36m", "\x1b[0m"
_ERASE = "\x1b[K"


class TideLine:
    """Shows one generation.

    Args:
        width: columns of the terminal, asked anew for each change.
        is_drawn: whether the terminal moves its cursor when told to; else finished text is all that is shown.
    """

    def __init__(self, stream: TextIO, width: Callable[[], int], is_drawn: bool, has_colour: bool):
        self._stream, self._width, self._is_drawn, self._has_colour = stream, width, is_drawn, has_colour
        self._column = 0  # of the cursor
        self._is_below = False  # whether the block at hand is drawn on the line below
        self._has_wrapped = False  # whether it was sent from behind the last column to the next line
        self._written = bytearray()  # of the block at hand, its last byte first

    def begin(self, prompt: str) -> None:
        """Show the prompt."""
        self._append(prompt, _DIM)

    def hear(self, event: Event) -> None:
        """Show what has happened."""
        if isinstance(event, Char):
            if event.id < 0x100:
                self._written.append(event.id)
                self._draw()
        elif isinstance(event, Block):
            self._let_go()
        else:
            self._append(event.text, "")

    def end(self, note: str = "") -> None:
        """Take away what is left of a block and end the line; with a note, where there is one."""
        self._let_go()
        if note:
            self._append(f"  [{note}]", _DIM)
        self._append("\n", "")

    def _append(self, text: str, colour: str) -> None:
        shown, width = visible(text), self._width()
        if self._has_wrapped and shown:  # where the first newline would leave a line empty
            shown, self._has_wrapped = shown.removeprefix("\n"), False
        for character in shown:
            cells = 0 if character == "\n" else columns(character)
            self._column = 0 if character == "\n" or self._column + cells > width else self._column
            self._column += cells
        margin = ""
        if self._column >= width:  # the cursor hangs behind the last column until something makes it wrap
            margin, self._column, self._has_wrapped = " \r", 0, True
        self._put(self._coloured(shown, colour) + margin)

    def _draw(self) -> None:
        if not self._is_drawn:
            return
        text, width = visible(bytes(self._written)[::-1].decode(errors="backslashreplace"), is_line=True), self._width()
        was_below, self._is_below = self._is_below, self._column + columns(text) >= width
        if not self._is_below:
            back = f"\x1b[{columns(text)}D" if columns(text) else ""
            self._put((self._below_erased() if was_below else "") + _ERASE + self._coloured(text, _AT_HAND) + back)
            return
        while columns(text) >= width:
            text = text[1:]
        before = "" if was_below else _ERASE
        self._put(before + "\r\n" + _ERASE + self._coloured(text, _AT_HAND) + self._back_up())

    def _let_go(self) -> None:
        self._written.clear()
        if self._is_drawn:
            self._put(self._below_erased() if self._is_below else _ERASE)
        self._is_below = False

    def _below_erased(self) -> str:
        return "\r\n" + _ERASE + self._back_up()

    def _back_up(self) -> str:
        return "\x1b[A\r" + (f"\x1b[{self._column}C" if self._column else "")

    def _coloured(self, text: str, colour: str) -> str:
        return f"{colour}{text}{_PLAIN}" if colour and self._has_colour else text

    def _put(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def visible(text: str, is_line: bool = False) -> str:
    """Text without anything that a terminal would obey, but for newlines. `is_line`: without these too."""
    return "".join(_visible(c, is_line) for c in text)


def _visible(character: str, is_line: bool) -> str:
    if character == "\n":
        return "⏎" if is_line else "\n"
    if character == "\t":
        return "    "
    is_shown = character.isprintable() or unicodedata.category(character) == "Zs"
    return character if is_shown else repr(character)[1:-1]
