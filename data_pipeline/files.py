"""Files that appear whole or not at all."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.errors import UserError


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the name `path` only when the block ends without an error.

    Raises:
        UserError: the file cannot be written (a full disk, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write ({error.strerror or error}); free space or choose another folder"
        ) from error
    finally:
        # Where its folder cannot be, there is no temporary file either.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with whole_file(path) as file:
        file.write(data)


def read_description(
    path: Path, version: int, required: set[str], error: type[UserError], absent: str, remedy: str
) -> tuple[dict[str, Any], bytes]:
    """The JSON file that describes a folder, and its bytes.

    Args:
        version: the value that its key "format" must have. required: further keys.
        error: what is raised. absent: its text where the file is not there. remedy: what to do where it is broken.
    """
    try:
        data = path.read_bytes()
        content = json.loads(data)
    except FileNotFoundError:
        raise error(absent) from None
    except (OSError, ValueError) as reason:
        raise error(f"{path}: cannot read ({reason}); {remedy}") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != version:
        raise error(f"{path}: format {found}, this program reads {version}; {remedy}")
    if missing := required - content.keys():
        raise error(f"{path}: lacks {', '.join(sorted(missing))}; {remedy}")
    return content, data


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
