"""Files that appear whole or not at all."""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

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


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, lie on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    except FileNotFoundError:
        raise error(absent) from None
    except OSError as reason:
        raise error(f"{path}: cannot read ({reason}); {remedy}") from None
    return parse_description(data, str(path), version, required, error, remedy), data


def parse_description(
    data: bytes, where: str, version: int, required: set[str], error: type[UserError], remedy: str
) -> dict[str, Any]:
    """The content of a JSON file that describes a folder; `where` names it, the rest as in `read_description`."""
    try:
        content = json.loads(data)
    except ValueError as reason:
        raise error(f"{where}: cannot read ({reason}); {remedy}") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != version:
        raise error(f"{where}: format {found}, this program reads {version}; {remedy}")
    if missing := required - content.keys():
        raise error(f"{where}: lacks {', '.join(sorted(missing))}; {remedy}")
    return content


def write_npz(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Arrays as an npz archive whose bytes depend on them alone, compressed fast: zlib's usual level takes ten times
    as long for a tenth less."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            data = io.BytesIO()
            np.lib.format.write_array(data, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), data.getbuffer(), zipfile.ZIP_DEFLATED, compresslevel=1)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
