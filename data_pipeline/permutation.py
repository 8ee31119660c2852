"""Keyed permutations that are the same on every machine and in every version of Python. Standard library only."""

import hashlib
import random
import struct
from collections.abc import Sequence

_WORD = 0xFFFFFFFF
_KEYS = struct.Struct("<8I")


def permutation(n: int, label: str) -> list[int]:
    """The numbers 0..n-1 in the order that `label` gives them."""
    # Sorting by random() keys: the sequence of random() is guaranteed across Python versions, that of shuffle() is not.
    rng = random.Random(label)
    keys = [rng.random() for _ in range(n)]
    return sorted(range(n), key=keys.__getitem__)


def keys_of(label: str) -> tuple[int, ...]:
    """The round keys of the permutation that `label` names, for `permuted`."""
    return _KEYS.unpack(hashlib.sha256(label.encode()).digest())


def permuted(i: int, n: int, keys: Sequence[int]) -> int:
    """The i-th of the numbers 0..n-1 in the order that `keys` give them, without computing the others.

    A Feistel network over the next power of two, walked until it is below n again: fewer than two walks on average,
    whatever n. n is at most 2^64.
    """
    bits = (n - 1).bit_length()
    low_bits = bits - bits // 2
    high_mask, low_mask = (1 << bits // 2) - 1, (1 << low_bits) - 1
    while True:
        high, low = i >> low_bits, i & low_mask
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            # Each half is changed by a mixed copy of the other, written out because this runs for every row.
            x = (low ^ first) * 0x9E3779B1 & _WORD
            x = (x ^ x >> 15) * 0x85EBCA77 & _WORD
            high ^= (x ^ x >> 13) & high_mask
            x = (high ^ second) * 0x9E3779B1 & _WORD
            x = (x ^ x >> 15) * 0x85EBCA77 & _WORD
            low ^= (x ^ x >> 13) & low_mask
        i = high << low_bits | low
        if i < n:
            return i
