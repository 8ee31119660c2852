"""Checksums of weights and optimizer moments that do not depend on how ranks share them.

The digest of a tensor is the sum, modulo 2**64, of a mix of each element's bits and its index in the whole tensor. A
sum does not ask who adds what and in which order: every rank adds up what it owns, and these sums are added.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch

# Finaliser of splitmix64 (Steele, Lea, Flood 2014), as signed 64-bit numbers, and the golden ratio's odd multiplier.
_GOLDEN, _FIRST, _SECOND = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_CHUNK = 1 << 15  # elements: stays in a core's cache, and torch does not share so few among threads


class Digest(NamedTuple):
    """Of one parameter: its weight and both moments of the optimizer, as signed 64-bit numbers."""

    weight: int
    exp_avg: int
    exp_avg_sq: int


def partial_digest(values: torch.Tensor, start: int) -> torch.Tensor:
    """What float32 `values`, the elements of a tensor from index `start` on, add to its digest: an int64 scalar."""
    flat = values.detach().reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for first in range(0, flat.numel(), _CHUNK):
        bits = flat[first : first + _CHUNK].contiguous().view(torch.int32).to(torch.int64)
        places = torch.arange(start + first, start + first + len(bits), device=flat.device)
        total += _mixed(places.add_(1).mul_(_GOLDEN).bitwise_xor_(bits)).sum()
    return total


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser, in place: a bijection after which every bit depends on all bits."""
    x.bitwise_xor_(_shifted(x, 30)).mul_(_FIRST)
    x.bitwise_xor_(_shifted(x, 27)).mul_(_SECOND)
    return x.bitwise_xor_(_shifted(x, 31))


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    # Torch shifts the sign in; zeros are wanted.
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def wrapped(total: int) -> int:
    """A sum as the signed 64-bit number that it is modulo 2**64."""
    return (total + 2**63) % 2**64 - 2**63


def added(parts: Iterable[dict[str, list[int]]]) -> dict[str, Digest]:
    """The digests by parameter from those of the ranks' parts."""
    totals: dict[str, list[int]] = {}
    for part in parts:
        for name, sums in part.items():
            totals[name] = [wrapped(a + b) for a, b in zip(totals.get(name, (0, 0, 0)), sums, strict=True)]
    return {name: Digest(*totals[name]) for name in sorted(totals)}
