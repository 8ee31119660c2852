"""A terminal of a few lines that obeys what a text being written tells it, and refuses all else."""

import re

from data_pipeline.reading import columns

_PIECE = re.compile(r"\x1b\[(\d*)([A-Za-z])|(.)", re.DOTALL)


class Terminal:
    """Attributes: `colour`: whether a colour was ever asked for."""

    def __init__(self, width: int, height: int = 12):
        self.width, self.height = width, height
        self.cells = [[" "] * width for _ in range(height)]
        self.row = self.column = 0
        self.colour = False

    def write(self, text: str) -> None:
        for number, command, character in _PIECE.findall(text):
            if command:
                self._obey(command, int(number or 1))
            elif character == "\n":
                self._down()
                self.column = 0  # the line discipline returns the carriage
            elif character == "\r":
                self.column = 0
            else:
                self._put(character)

    def flush(self) -> None:
        """Everything is on the screen already."""

    def _obey(self, command: str, number: int) -> None:
        if command == "K":
            column = min(self.column, self.width - 1)
            self.cells[self.row][column:] = [" "] * (self.width - column)
        elif command == "A":
            self.row = max(self.row - number, 0)
        elif command == "C":
            self.column = min(self.column + number, self.width - 1)
        elif command == "D":
            self.column = max(min(self.column, self.width - 1) - number, 0)
        else:
            assert command == "m", command
            self.colour = True

    def _put(self, character: str) -> None:
        assert character.isprintable() or character == "\u3000", repr(character)
        cells = columns(character)
        if not cells:
            return
        if self.column + cells > self.width:  # only now does it wrap
            self._down()
            self.column = 0
        self.cells[self.row][self.column : self.column + cells] = [character, *[""] * (cells - 1)]
        self.column += cells

    def _down(self) -> None:
        self.row += 1
        if self.row == self.height:
            self.cells = [*self.cells[1:], [" "] * self.width]
            self.row -= 1

    def lines(self) -> list[str]:
        """What is on the screen, empty lines at the end left out."""
        return "\n".join("".join(line).rstrip() for line in self.cells).rstrip().split("\n")
