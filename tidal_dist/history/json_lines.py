"""Files of a run with one JSON object a line, each of a step; a run that goes on from a checkpoint cuts them back."""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipeline.files import whole_file
from tidal_dist.errors import UserError

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class StepLines:
    """Appends to a file of a run, in which nothing stands after step `start`, where the run goes on; 0: anew.

    Raises:
        UserError: what stands there cannot be read or cut back.
    """

    def __init__(self, path: Path, start: int):
        self._path = path
        with whole_file(path) as file:
            for line in read_lines(path) if start else ():
                if line["step"] <= start:
                    file.write(_as_line(line))

    def add(self, step: int, content: dict[str, Any]) -> None:
        """Append a line; numbers that JSON does not know are written as "nan", "inf" and "-inf".

        Raises:
            OSError: it cannot be written; the file is as it was.
        """
        data = _as_line({"step": step, "time": round(time.time(), 3)} | content)
        with open(self._path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) != len(data):
                    raise OSError(28, "No space left on device")
            except OSError:
                with suppress(OSError):
                    os.truncate(self._path, size)
                raise


def _as_line(content: dict[str, Any]) -> bytes:
    named = {key: _named(value) for key, value in content.items()}
    return json.dumps(named, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _named(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file; none where there is no file. What a crash tore, at the end or elsewhere, is not there.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            for data in file:
                if (line := _parsed(data)) is not None:
                    yield line
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror}); move it away to do without it") from None


def _parsed(data: bytes) -> dict[str, Any] | None:
    if not data.endswith(b"\n"):
        return None
    try:
        line = json.loads(data)
    except ValueError:
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        return None
    return {k: _NOT_FINITE.get(v, v) if isinstance(v, str) else v for k, v in line.items()}
