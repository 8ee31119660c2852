"""How much the doctor examines. Imports nothing: the command line shows these defaults."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """How much is examined: `documents` that are decoded, `blocks` of each, and `rows` of the shards."""

    documents: int = 32
    blocks: int = 6
    rows: int = 64


DEFAULT_SIZES = Sizes()
