"""Text that every machine has: the source of Python's standard library, as `configs/stdlib.yaml` names it."""

import os
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import zip_longest
from pathlib import Path

from data_pipeline.corpus import files_of
from experiments.tasks.writing import Sample, is_tested
from tidal_dist.config import load_config
from tidal_dist.errors import ConfigError

_CONFIG = Path(__file__).parents[2] / "configs" / "stdlib.yaml"
# Documentation strings, nearly all of them: a text between three quotation marks that holds a sentence.
_DOCSTRING = re.compile(r'"""(.+?)"""', re.DOTALL)
_SENTENCE = re.compile(r"[a-z]+ [a-z]+.*?[.:]", re.DOTALL)


@cache
def library() -> dict[str, str]:
    """Path within the library -> text, of every file that holds text in UTF-8; sorted by path."""
    folder = sysconfig.get_path("stdlib")
    (source,) = load_config(_CONFIG).corpus.sources
    found = {}
    for file in files_of(source):
        try:
            text = Path(file.path).read_bytes().decode()
        except UnicodeDecodeError:  # written in another encoding on purpose
            continue
        if text:
            found[os.path.relpath(file.path, folder)] = text
    return found


def shuffled_texts(tested: bool, seed: int) -> list[str]:
    """The files that are kept for tests, or all others, in an order that the seed decides."""
    texts = [text for path, text in library().items() if is_tested(path) == tested]
    random.Random(f"files {seed}").shuffle(texts)
    return texts


def docstrings(texts: Iterable[str]) -> Iterator[str]:
    """The documentation strings of files, each once, without their indentation."""
    seen = set()
    for text in texts:
        for found in _DOCSTRING.findall(text):
            plain = "\n".join(line.strip() for line in found.strip().splitlines())
            if plain not in seen and _SENTENCE.search(plain):
                seen.add(plain)
                yield plain


def passages(text: str, size: int) -> Iterator[str]:
    """Pieces of about `size` bytes, cut between lines; a rest of less than half of that is left out."""
    lines: list[str] = []
    held = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        held += len(line.encode())
        if held >= size:
            yield "".join(lines)
            lines, held = [], 0
    if held > size // 2:
        yield "".join(lines)


def spread_passages(texts: Iterable[str], size: int) -> Iterator[str]:
    """The first passage of every text, then the second of every text, and so on: from all over the texts."""
    for of_each in zip_longest(*(passages(text, size) for text in texts)):
        yield from (passage for passage in of_each if passage is not None)


def samples_up_to(texts: Iterable[str], size: int | None) -> Iterator[Sample]:
    """The first texts as samples, up to the one that reaches `size` bytes; none: all."""
    held = 0
    for text in texts:
        yield {"text": text}
        held += len(text.encode())
        if size is not None and held >= size:
            return


def samples_of(texts: Iterable[str], size: int | None, what: str) -> list[Sample]:
    """The same, where there must be so much.

    Raises:
        ConfigError: there is less; `what` names it.
    """
    found = list(samples_up_to(texts, size))
    held = sum(len(sample["text"].encode()) for sample in found)
    if size is not None and held < size:
        raise ConfigError(f"{what}: asks for {size} bytes of text, there are {held}; ask for less")
    return found
