"""The char stream as people read it: its characters from left to right, though it is written from right to left."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from data_pipeline.layout import IGNORED, Slots
from data_pipeline.tokenizer import EOB, EOS

END_MARKS = {EOB: "<eob>", EOS: "<eos>"}


@dataclass(frozen=True)
class Written:
    """One character of a supervised block, or the block's end mark.

    Attributes:
        text: the character, or the name of the end mark.
        slots: the char slots whose labels are its bytes, in reading order.
        block: index of the block. is_end: whether it is the end mark.
    """

    text: str
    slots: list[int]
    block: int
    is_end: bool = False


def block_starts(slots: Slots) -> np.ndarray:
    """Slots (n,) whose block is not that of the slot before them, the first one included."""
    changes = (np.diff(slots.document) != 0) | (np.diff(slots.block) != 0)
    return np.concatenate([[0], np.flatnonzero(changes) + 1])[: len(slots.ids)]


def in_reading_order(chars: Slots, labels: np.ndarray) -> list[Written]:
    """What a char stream (C,) with its labels (C,) writes. A block's end mark, written last, stands at its left."""
    borders = [*block_starts(chars).tolist(), len(labels)]
    return [w for start, end in pairwise(borders) for w in _block(chars, labels, start, end)]


def _block(chars: Slots, labels: np.ndarray, start: int, end: int) -> Iterator[Written]:
    character: list[int] = []
    for slot in reversed(range(start, end)):
        label = int(labels[slot])
        if label == IGNORED:
            continue
        if character and not 0x80 <= label < 0xC0:
            yield _character(chars, labels, character)
            character = []
        if label in END_MARKS:
            yield Written(END_MARKS[label], [slot], int(chars.block[slot]), is_end=True)
        else:
            character.append(slot)
    if character:
        yield _character(chars, labels, character)


def _character(chars: Slots, labels: np.ndarray, slots: list[int]) -> Written:
    data = bytes(int(labels[slot]) for slot in slots)
    return Written(data.decode(errors="backslashreplace"), slots, int(chars.block[slots[0]]))


def columns(text: str) -> int:
    """Width of a text in a font of fixed width: letters of Chinese, Japanese and Korean are two columns wide."""
    return sum(_columns_of(c) for c in text)


def _columns_of(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
