"""Digests of tensors: independent of how they are shared out, changed by any change of an element or of its place."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from tidal_dist.training import digest
from tidal_dist.training.digest import added, partial_digest, wrapped

values = st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=60)


def whole(numbers: list[float], start: int = 0) -> int:
    return int(partial_digest(torch.tensor(numbers, dtype=torch.float32), start))


@given(values, st.data())
def test_parts_add_up_to_the_whole(numbers: list[float], data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(numbers)), max_size=5).map(sorted))
    bounds = [0, *cuts, len(numbers)]
    pairs = data.draw(st.permutations(list(pairwise(bounds))))
    parts = [{"w": [whole(numbers[a:b], a), 0, 0]} for a, b in pairs]
    assert added(parts)["w"].weight == whole(numbers)


@given(values, st.integers(0, 31), st.data())
def test_one_bit_changes_it(numbers: list[float], bit: int, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(numbers) - 1))
    tensor = torch.tensor(numbers, dtype=torch.float32)
    flipped = tensor.clone()
    bits = flipped.view(torch.int32)
    bits[place] ^= wrapped32(1 << bit)
    assert int(partial_digest(flipped, 0)) != int(partial_digest(tensor, 0))


def wrapped32(number: int) -> int:
    return number - 2**32 if number >= 2**31 else number


@given(values, st.data())
def test_two_elements_that_change_places_change_it(numbers: list[float], data: st.DataObject) -> None:
    a, b = data.draw(st.tuples(*[st.integers(0, len(numbers) - 1)] * 2))
    tensor = torch.tensor(numbers, dtype=torch.float32)
    swapped = tensor.clone()
    swapped[[a, b]] = tensor[[b, a]]
    is_same = torch.equal(swapped.view(torch.int32), tensor.view(torch.int32))
    assert (int(partial_digest(swapped, 0)) == int(partial_digest(tensor, 0))) == is_same


def test_it_is_what_splitmix_says() -> None:
    """Against plain integers, over several chunks, at indices beyond 32 bits."""
    numbers = torch.randn(3 * digest._CHUNK + 5, generator=torch.Generator().manual_seed(1))
    start = 2**40 + 7
    total = 0
    for n, bits in enumerate(numbers.view(torch.int32).tolist()):
        x = ((start + n + 1) * 0x9E3779B97F4A7C15 % 2**64) ^ (bits % 2**64)
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        total += x ^ (x >> 31)
    assert int(partial_digest(numbers, start)) == wrapped(total)


def test_shape_of_the_slice_does_not_matter() -> None:
    numbers = torch.randn(6, 4)
    assert int(partial_digest(numbers.t(), 0)) == int(partial_digest(numbers.t().contiguous().view(-1), 0))
