"""The hashes of the corpus files that shards were made of, as `sha256sum --check` reads them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from data_pipeline.corpus import SourceFile
from data_pipeline.files import sha256_of
from data_pipeline.readers.sources import cannot_read, is_remote

CORPUS = "corpus.sha256"  # in the folder of the shards


def hash_files(files: Sequence[SourceFile]) -> list[str]:
    """A line for each file on a disk. One behind a URL has none: it would have to be fetched once more.

    Raises:
        CorpusError: a file cannot be read.
    """
    return [_line(file.path) for file in files if not is_remote(file.path)]


def _line(path: str) -> str:
    try:
        sha256 = sha256_of(Path(path))
    except OSError as error:
        raise cannot_read(path, error) from None
    name = path.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if name == path else chr(92)}{sha256}  {name}"  # a backslash in front says that there are some


def as_list(lines: Iterable[str]) -> bytes:
    """The content of the file; the corpus alone decides the order."""
    return "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
