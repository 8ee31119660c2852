import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.permutation import keys_of, permutation, permuted


def order_of(n: int, label: str) -> list[int]:
    return [permuted(i, n, keys_of(label)) for i in range(n)]


@pytest.mark.parametrize("n", [*range(70), 97, 127, 128, 129, 1000, 1021, 1024, 4096, 4097])
def test_it_is_a_bijection(n: int) -> None:
    assert sorted(order_of(n, f"of {n}")) == list(range(n))


@given(st.integers(1, 1 << 63), st.data())
def test_it_stays_within_a_large_range(n: int, data: st.DataObject) -> None:
    few = data.draw(st.sets(st.integers(0, n - 1), max_size=20))
    found = {permuted(i, n, keys_of("large")) for i in few}
    assert len(found) == len(few)
    assert all(0 <= j < n for j in found)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_small_orders_are_all_reached_and_about_equally_often(n: int) -> None:
    seen = Counter(tuple(order_of(n, f"label {k}")) for k in range(60 * math.factorial(n)))
    assert len(seen) == math.factorial(n)
    assert max(seen.values()) < 3 * 60
    assert min(seen.values()) > 60 / 3


@pytest.mark.parametrize("n", [64, 100, 1000])
def test_it_mixes(n: int) -> None:
    """Neighbours land anywhere, numbers from everywhere land in each part, and hardly any stays in its place."""
    orders = [order_of(n, f"label {k}") for k in range(40_000 // n)]
    steps = Counter((b - a) % n for order in orders for a, b in pairwise(order))
    expected = sum(steps.values()) / (n - 1)
    chi_square = sum((steps[d] - expected) ** 2 / expected for d in range(1, n))
    assert abs(chi_square - (n - 2)) < 6 * math.sqrt(2 * n)
    halves = Counter((a < n // 2, b < n // 2) for order in orders for a, b in enumerate(order))
    assert min(halves.values()) > 0.23 * 40_000
    assert sum(a == b for order in orders for a, b in enumerate(order)) < 3 * len(orders)


def test_labels_give_different_orders() -> None:
    assert len({tuple(order_of(100, f"rows 1 0 {shard}")) for shard in range(200)}) == 200


def test_golden_permutations() -> None:
    """The same on every machine and in every version of Python."""
    assert order_of(10, "golden") == [7, 9, 8, 6, 4, 5, 0, 3, 1, 2]
    assert permuted(123_456, 10**6, keys_of("golden")) == 396_543
    assert permuted(5, (1 << 40) + 7, keys_of("golden")) == 753_153_040_964
    assert permutation(10, "golden") == [3, 9, 7, 6, 2, 4, 1, 0, 8, 5]
