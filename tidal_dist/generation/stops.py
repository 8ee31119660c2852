"""How much of a stop string a text ends with, while it grows: Knuth, Morris and Pratt 1977."""


class Ending:
    """Reads a text piece by piece, each character once, whatever the length of the stop string."""

    def __init__(self, stop: str):
        self._stop = stop
        self._found = 0  # characters of the stop string, from its start, with which the text ends
        self._shorter = [0]  # [n - 1]: the most of them, fewer than n, with which n of them end; as far as was found

    def read(self, piece: str) -> None:
        """Go on in the text."""
        for character in piece:
            self._found = self._after(self._found, character)
            if self._found > len(self._shorter):
                self._shorter.append(self._after(self._shorter[-1], character))

    def _after(self, found: int, character: str) -> int:
        while found and (found == len(self._stop) or self._stop[found] != character):
            found = self._shorter[found - 1]
        return found + (self._stop[found] == character)

    @property
    def length(self) -> int:
        """Characters at the text's end that may turn out to begin the stop string: fewer than it has."""
        return self._shorter[-1] if self._found == len(self._stop) else self._found
