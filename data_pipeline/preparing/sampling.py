"""Which documents are held out, and which text trains the tokeniser: functions of the corpus alone."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from data_pipeline.documents import Document

# Below this a part of the corpus is not worth opening.
_LEAST_OF_A_PART = 16_384
# A part is read at most so many times further than what it gives, so that it is not its start alone that counts.
_THINNING = 2
_WORD = 1 << 64
_STRIDE = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: the multiples of it are spread evenly
_LONGEST_CHARACTER = 4  # bytes; fewer may be left over


def is_validation(document: Document, fraction: float) -> bool:
    """Whether a document belongs to the validation split: a function of its text alone."""
    digest = hashlib.sha256(f"{document.prompt}\0{document.text}".encode()).digest()
    return int.from_bytes(digest[:8]) < fraction * _WORD


@dataclass(frozen=True)
class Part:
    """A part of the corpus: a file, or what one task cleaned. `size` in bytes, as far as it is known."""

    size: int
    documents: Callable[[], Iterable[Document]]


@dataclass
class Sampled:
    """What a sample took."""

    bytes: int = 0
    documents: int = 0
    parts: int = 0


def sample_texts(parts: Sequence[Part], max_bytes: int, validation_fraction: float, sampled: Sampled) -> Iterator[str]:
    """Text of training documents from all over the corpus, `max_bytes` at most.

    Parts are visited in an order that only their number decides, and each gives a fair share: all that it has, if it is
    small, and otherwise as much as the other large ones.

    Args:
        sampled: what is taken is added to it.
    """
    share = max(_fair_share([part.size for part in parts], max_bytes), _LEAST_OF_A_PART)
    for number in sorted(range(len(parts)), key=lambda n: n * _STRIDE % _WORD):
        sampled.parts += 1
        quota = min(share, max_bytes - sampled.bytes)
        yield from _texts_of(parts[number], quota, validation_fraction, sampled)
        if max_bytes - sampled.bytes < _LONGEST_CHARACTER:
            return


def _texts_of(part: Part, quota: int, fraction: float, sampled: Sampled) -> Iterator[str]:
    threshold = min(max(quota / max(part.size, 1), 1 / _THINNING), 1.0) * _WORD
    left = quota
    for i, document in enumerate(part.documents()):
        if i * _STRIDE % _WORD >= threshold or is_validation(document, fraction):
            continue
        sampled.documents += 1
        for text in (document.prompt, document.text):
            taken = text.encode()[:left].decode(errors="ignore")
            left -= len(taken.encode())
            sampled.bytes += len(taken.encode())
            if taken:
                yield taken
        if left < _LONGEST_CHARACTER:
            return


def _fair_share(sizes: Sequence[int], total: int) -> int:
    """The most that any part gives, so that together they give `total`: the small ones all, the large ones alike."""
    left = total
    for i, size in enumerate(sorted(sizes)):
        share = -(-left // (len(sizes) - i))
        if size > share:
            return share
        left -= size
    return total
