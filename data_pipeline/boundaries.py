"""The borders of `segmentation.segment`, found over whole arrays of UTF-8 bytes instead of character by character.

`segment` is the definition; this is its fast equal. Whether a block starts at a character can nearly always be told
from the character and its two neighbours, so that comparing a few arrays finds all borders at once.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import regex

from data_pipeline.segmentation import CHARACTER_CLASSES, SegmentationConfig

# A class is twice the kind of a character, plus one for ' ' and '-', which may lead a block of what follows.
# The order matters: _WORD and all above take a leading space; from _UNSPACED to _NUMBER, nothing precedes a sign.
_NONE, _WHITE, _SPACE, _UNSPACED, _WORD, _NUMBER, _OTHER, _DASH = 0, 2, 3, 4, 6, 8, 10, 11
_CLASSES = {"white": _WHITE, "unspaced": _UNSPACED, "word": _WORD, "number": _NUMBER, "other": _OTHER}
# UTF-8: bytes of a character, its lowest first byte, and the lowest of longer characters.
_LONG_CHARACTERS = ((2, 0xC0, 0xE0), (3, 0xE0, 0xF0), (4, 0xF0, 0xF8))


def block_starts(data: bytes, text_starts: np.ndarray, config: SegmentationConfig) -> np.ndarray:
    """Where the blocks of texts that are laid end to end start.

    Args:
        data: well-formed UTF-8 of all texts.
        text_starts: (d,) ascending offsets of the texts in `data`, from 0 on; an empty text starts where the next does.
        config: how the texts are cut.

    Returns:
        (k,) int64, ascending offsets of all blocks of `segment(text, config)` of each text.
    """
    if not data:
        return np.empty(0, np.int64)
    return _cut_long(data, np.flatnonzero(_piece_starts(data, text_starts, _classes(data), config)), config)


def parts_in_blocks(
    data: bytes, text_starts: np.ndarray, config: SegmentationConfig, part_bytes: int
) -> Iterator[tuple[bytes, np.ndarray]]:
    """The blocks of texts that are laid end to end, a part of `data` at a time, so that memory stays bounded.

    Args:
        data, text_starts, config: as for `block_starts`.
        part_bytes: about the size of the parts. They are larger only where no border is certain.

    Yields:
        part: consecutive bytes of `data`, whole blocks. starts: (k,) int64, offsets of its blocks.
    """
    part_bytes = max(part_bytes, 4)  # every part has a whole character
    start, size = 0, part_bytes
    while start < len(data):
        end = _character_border(data, start + size)
        part = data[start:end]
        low, high = np.searchsorted(text_starts, [start, end])
        firsts = np.append(0, text_starts[low:high] - start)
        if end == len(data):
            starts, used = block_starts(part, firsts, config), len(part)
        else:
            starts, used = _certain_block_starts(part, firsts, config)
        if used:
            yield part[:used], starts
        # Nothing certain: the part is too short for a single block.
        start, size = start + used, part_bytes if used else 2 * size


def _certain_block_starts(data: bytes, text_starts: np.ndarray, config: SegmentationConfig) -> tuple[np.ndarray, int]:
    """Blocks at the start of `data` that stand whatever follows, and their end, from which the rest is cut as a text.

    `data` ends between two characters; the end is 0 where nothing is certain.
    """
    classes = _classes(data)
    is_piece = _piece_starts(data, text_starts, classes, config)
    starts = _cut_long(data, np.flatnonzero(is_piece), config)
    # What follows the last character decides whether that starts a block.
    n = int(np.searchsorted(starts, _character_border(data, len(data) - 1))) - 1
    while n > 0 and not _begins_a_text(int(starts[n]), classes, is_piece):
        n -= 1
    return (starts[:n], int(starts[n])) if n > 0 else (starts[:0], 0)


def _begins_a_text(start: int, classes: np.ndarray, is_piece: np.ndarray) -> bool:
    """Whether the text from a block's start on, taken alone, surely has the same blocks."""
    if not is_piece[start]:
        # Unspaced script is counted in characters from the start of the run, not from where bytes were too many.
        return bool(classes[start] != _UNSPACED)
    # At the start of a text, '-' and a number is a sign; behind a letter or a number it is not.
    return bool(classes[start] != _DASH or classes[start + 1] != _NUMBER)


def _character_border(data: bytes, at: int) -> int:
    """The last border between two characters of `data` up to `at`."""
    if at >= len(data):
        return len(data)
    while data[at] & 0xC0 == 0x80:
        at -= 1
    return at


def _piece_starts(data: bytes, text_starts: np.ndarray, classes: np.ndarray, config: SegmentationConfig) -> np.ndarray:
    """(n,) bool: where the pieces of the segmentation's pattern start, before long ones are cut by their bytes."""
    text_starts = text_starts[text_starts < len(data)]
    before, after = np.empty_like(classes), np.empty_like(classes)
    before[1:], after[:-1] = classes[:-1], classes[1:]
    before[text_starts] = after[text_starts - 1] = _NONE  # the first text's -1 is the end of the last
    leads = (classes == _SPACE) & (after >= _WORD)
    leads |= (classes == _DASH) & (after == _NUMBER) & ((before < _UNSPACED) | (before > _NUMBER))
    is_start = (classes ^ before > 1) | leads  # another kind, or one that leads what follows
    is_start[1:] &= ~leads[:-1]
    if not data.isascii():
        _cut_unspaced(is_start, data, classes, config.max_unspaced_chars)
    return is_start


def _cut_unspaced(is_start: np.ndarray, data: bytes, classes: np.ndarray, limit: int) -> None:
    """Mark every `limit`-th character of the runs of unspaced script in `is_start`."""
    first_bytes = np.frombuffer(data, np.uint8) & 0xC0 != 0x80
    at = np.flatnonzero((classes == _UNSPACED) & first_bytes)
    n = np.arange(len(at))
    run = np.maximum.accumulate(np.where(is_start[at], n, 0))
    is_start[at[(n - run) % limit == 0]] = True


def _cut_long(data: bytes, starts: np.ndarray, config: SegmentationConfig) -> np.ndarray:
    """`starts` with further ones where a block would be too long."""
    limit = config.max_block_bytes
    ends = np.append(starts[1:], len(data))
    long = np.flatnonzero(ends - starts > limit)
    cuts = []
    for start, end in zip(starts[long].tolist(), ends[long].tolist(), strict=True):
        while end - start > limit:
            start = _character_border(data, start + limit)
            cuts.append(start)
    if not cuts:
        return starts
    return np.sort(np.concatenate([starts, cuts]), kind="stable")


def _classes(data: bytes) -> np.ndarray:
    """(n,) uint8: the class of the character that each byte belongs to."""
    classes = np.frombuffer(bytearray(data.translate(_ascii_table())), np.uint8)
    if data.isascii():
        return classes
    raw = np.frombuffer(data, np.uint8)
    first_bytes = np.flatnonzero(raw >= 0xC0)
    for size, low, high in _LONG_CHARACTERS:
        at = first_bytes[(raw[first_bytes] >= low) & (raw[first_bytes] < high)]
        points = (raw[at] & (0x7F >> size)).astype(np.int32)
        for i in range(1, size):
            points = points << 6 | raw[at + i] & 0x3F
        found = _unicode_table()[points]
        for i in range(size):
            classes[at + i] = found
    return classes


@lru_cache(maxsize=1)
def _ascii_table() -> bytes:
    return _class_table(0x80).tobytes().ljust(256, b"\0")


@lru_cache(maxsize=1)
def _unicode_table() -> np.ndarray:
    return _class_table(0x110000)


def _class_table(count: int) -> np.ndarray:
    """(count,) uint8: the classes of the first code points."""
    characters = "".join(map(chr, range(count)))
    table = np.zeros(count, np.uint8)
    for name, pattern in CHARACTER_CLASSES.items():
        for run in regex.finditer(f"{pattern}+", characters, regex.VERSION1):
            table[run.start() : run.end()] = _CLASSES[name]
    table[ord(" ")], table[ord("-")] = _SPACE, _DASH
    return table
