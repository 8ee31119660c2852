"""RUN/rolling_hash.tsv: after which step and how many rows the rolling hash was what."""

from pathlib import Path
from typing import NamedTuple

from data_pipeline.files import replace_file
from tidal_dist.errors import UserError

ROLLING_HASH = "rolling_hash.tsv"
_HEADER = "step\trows\trolling_hash"


class Line(NamedTuple):
    """The rolling hash after `step` steps, which consumed `rows` rows."""

    step: int
    rows: int
    rolling_hash: str


class RollingLog:
    """Appends to the log of a run's folder, in which nothing stands after `start`, where the run goes on.

    Args:
        first: the line of a run that has consumed nothing. start: that of the checkpoint that is resumed from.
    """

    def __init__(self, run: Path, first: Line, start: Line):
        self._path = run / ROLLING_HASH
        kept = [line for line in read_log(run) if line.step < start.step] if start.step else []
        lines = [_as_text(line) for line in dict.fromkeys([first, *kept, start])]
        replace_file(self._path, "".join(f"{line}\n" for line in [_HEADER, *lines]).encode())

    def add(self, line: Line) -> None:
        """Append a line."""
        try:
            with open(self._path, "a", encoding="ascii") as file:
                file.write(f"{_as_text(line)}\n")
        except OSError as error:
            raise UserError(f"{self._path}: cannot write ({error.strerror}); free space, then resume") from None


def _as_text(line: Line) -> str:
    return "\t".join(map(str, line))


def read_log(run: Path) -> list[Line]:
    """The lines of a run's log; [] where there is none. A last line that was cut off is not there.

    Raises:
        UserError: it cannot be read.
    """
    path = run / ROLLING_HASH
    try:
        text = path.read_text("ascii")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read ({error}); move it away to do without it") from None
    found = []
    for number, text_line in enumerate(text[: text.rfind("\n") + 1].splitlines()[1:], 2):
        step, rows, rolling_hash = [*text_line.split("\t"), "", "", ""][:3]
        if not (step.isdigit() and rows.isdigit() and len(rolling_hash) == 64):
            raise UserError(f"{path}:{number}: not a line of step, rows and hash; move the file away to do without it")
        found.append(Line(int(step), int(rows), rolling_hash))
    return found
