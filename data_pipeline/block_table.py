"""Blocks -> numbers: a hash table made of arrays, which looks up all blocks of a text at once.

A block is read as little-endian words of 8 bytes, filled up with 0xFF, a byte that UTF-8 never has; a block of 8, 16,
... bytes has one more word of filling, so that no block's words begin with all the words of another.
"""

from array import array
from dataclasses import dataclass

import numpy as np

_FILLING = np.array([(1 << 64) - (1 << 8 * size) if size < 8 else 0 for size in range(256)], np.uint64)
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the high bits of a product depend on all of the word
_TOP = np.uint64(1 << 63)
_LEAST_SLOTS = 1 << 12


class BlockTable:
    """Different blocks, numbered from 1 in the order in which they are added."""

    def __init__(self) -> None:
        self._slots = np.zeros(_LEAST_SLOTS, np.int32)  # the number of a block, or 0
        # By number; number 0 is no block. These grow in place, so no numpy view of them may outlive a call.
        self._hashes, self._first_word = array("Q", [0]), array("q", [0])
        self._words = array("Q", [0])  # of the blocks that have several

    def __len__(self) -> int:
        """How many blocks there are."""
        return len(self._hashes) - 1

    @property
    def nbytes(self) -> int:
        """Memory of the table."""
        return self._slots.nbytes + 16 * len(self._hashes) + 8 * len(self._words)

    def find(self, data: bytes, starts: np.ndarray) -> np.ndarray:
        """The numbers of blocks, 0 where one is not there.

        Args:
            data: blocks of UTF-8, end to end. starts: (k,) int64, their offsets.

        Returns:
            (k,) int64.
        """
        keys = _keys(data, starts)
        hashes = np.frombuffer(self._hashes, np.uint64)
        slot = self._first_slot(keys.hashes)
        numbers = self._slots.take(slot).astype(np.int64)
        wrong = np.flatnonzero(hashes.take(numbers) != keys.hashes)
        while len(wrong := wrong[numbers[wrong] > 0]):
            slot[wrong] = (slot[wrong] + 1) % len(self._slots)
            numbers[wrong] = self._slots[slot[wrong]]
            wrong = wrong[hashes[numbers[wrong]] != keys.hashes[wrong]]
        self._forget_strangers(numbers, keys)
        return numbers

    def _forget_strangers(self, numbers: np.ndarray, keys: "_Keys") -> None:
        """Set the numbers to 0 whose block has the hash, but not the words, of the one that was looked up."""
        words = np.frombuffer(self._words, np.uint64)
        first_word = np.frombuffer(self._first_word, np.int64)[numbers[keys.long]]
        for i, (which, word) in enumerate(keys.words):
            strange = words.take(first_word[which] + i, mode="clip") != word
            numbers[keys.long[which[strange]]] = 0

    def add(self, data: bytes, starts: np.ndarray) -> None:
        """Add blocks, all different and none of them there; arguments as for `find`."""
        keys = _keys(data, starts)
        first_word = np.zeros(len(starts), np.int64)
        counts = np.zeros(len(keys.long), np.int64)
        for which, _ in keys.words:
            counts[which] += 1
        ends = np.cumsum(counts)
        words = np.empty(int(counts.sum()), np.uint64)
        for i, (which, word) in enumerate(keys.words):
            words[(ends - counts)[which] + i] = word
        first_word[keys.long] = len(self._words) + ends - counts
        self._first_word.frombytes(first_word.tobytes())
        self._words.frombytes(words.tobytes())
        first = len(self._hashes)
        self._hashes.frombytes(keys.hashes.tobytes())
        if len(self._hashes) * 4 > len(self._slots):
            self._slots = np.zeros(1 << (len(self._hashes) * 4).bit_length(), np.int32)
            first = 1
        self._enter(first)

    def _enter(self, first: int) -> None:
        """Give slots to the blocks from number `first` on."""
        numbers = np.arange(first, len(self._hashes), dtype=np.int32)
        slot = self._first_slot(np.frombuffer(self._hashes, np.uint64)[first:])
        while len(numbers):
            free = self._slots[slot] == 0
            self._slots[slot[free]] = numbers[free]
            homeless = self._slots[slot] != numbers  # the slot was taken, or another of these took it just now
            numbers, slot = numbers[homeless], (slot[homeless] + 1) % len(self._slots)

    def _first_slot(self, hashes: np.ndarray) -> np.ndarray:
        bits = len(self._slots).bit_length() - 1
        return (hashes << np.uint64(1) >> np.uint64(64 - bits)).astype(np.int64)


@dataclass(frozen=True)
class _Keys:
    """What k blocks are looked up by.

    Attributes:
        hashes: (k,) uint64. Blocks of one word (less than 8 bytes) have different ones and a top bit of 0;
            those of several words have a top bit of 1, and may share a hash.
        long: (l,) int64, which blocks have several words.
        words: for i = 0, 1, ...: which of `long` have a word i, and these words.
    """

    hashes: np.ndarray
    long: np.ndarray
    words: list[tuple[np.ndarray, np.ndarray]]


def _keys(data: bytes, starts: np.ndarray) -> _Keys:
    word_at = np.ndarray(len(data) + 1, "<u8", data + bytes(8), strides=(1,))
    sizes = np.diff(starts, append=len(data))
    first = word_at[starts] | _FILLING[sizes]
    # The top byte of a block of one word is filling, and multiplying by an odd number modulo 2^63 loses nothing.
    hashes = first * _ODD & ~_TOP
    long = np.flatnonzero(sizes >= 8)
    which, offsets, sizes = np.arange(len(long)), starts[long], sizes[long]
    words = [(which, first[long])]
    mixed = hashes[long]
    while len(which := which[sizes >= 8]):
        offsets, sizes = offsets[sizes >= 8] + 8, sizes[sizes >= 8] - 8
        word = word_at[offsets] | _FILLING[sizes]
        mixed[which] = _mix(mixed[which], word)
        words.append((which, word))
    hashes[long] = mixed | _TOP
    return _Keys(hashes, long, words)


def _mix(hashes: np.ndarray, words: np.ndarray) -> np.ndarray:
    # Plus one: words of zeros must not leave a hash of zero as it is.
    return (hashes ^ hashes >> np.uint64(29) ^ words) * _ODD + np.uint64(1)
