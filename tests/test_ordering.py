import ast
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import ordering
from data_pipeline.ordering import Order, RowAddress, row_random, rows_of_rank

LANES = 8
SHARDS = (17, 0, 30, 9, 1, 44, 12)  # 113 rows, one of them dropped; an empty shard and one of a single row
ORDER = Order(SHARDS, LANES, seed=1)

shard_rows = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda rows: sum(rows) >= LANES).map(tuple)


def epoch_of(order: Order, epoch: int) -> list[RowAddress]:
    return [order.locate(epoch * order.rows_per_epoch + i) for i in range(order.rows_per_epoch)]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("rows_per_step", [8, 16, 24, 64])
def test_ranks_share_out_each_step(world: int, rows_per_step: int) -> None:
    for step in (0, 1, 7, 10**9):
        shares = [rows_of_rank(step, rows_per_step, rank, world) for rank in range(world)]
        assert sorted(g for share in shares for g in share) == list(
            range(step * rows_per_step, (step + 1) * rows_per_step)
        )
        assert {len(share) for share in shares} == {rows_per_step // world}


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_world_sees_the_same_rows_in_every_step(world: int, accumulation: int) -> None:
    """One step of `accumulation` micro-batches on `world` ranks reads what one rank reads in one batch."""
    rows_per_step = 16
    for step in range(2 * ORDER.rows_per_epoch // rows_per_step):
        seen: Counter[RowAddress] = Counter()
        for rank in range(world):
            rows = rows_of_rank(step, rows_per_step, rank, world)
            size = len(rows) // accumulation
            for i in range(0, len(rows), size):
                seen.update(Order(SHARDS, LANES, seed=1).locate(g) for g in rows[i : i + size])
        assert seen == Counter(ORDER.locate(g) for g in range(step * rows_per_step, (step + 1) * rows_per_step))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_a_rank_reads_whole_lanes(world: int) -> None:
    for rank in range(world):
        lanes = {g % LANES for step in range(5) for g in rows_of_rank(step, 24, rank, world)}
        assert lanes == set(range(rank, LANES, world))


@given(shard_rows, st.integers(0, 5), st.sampled_from([1, 2, 8]), st.integers(0, 4))
def test_every_row_once_per_epoch_but_the_dropped(shards: tuple[int, ...], seed: int, lanes: int, epoch: int) -> None:
    order = Order(shards, lanes, seed)
    seen = epoch_of(order, epoch)
    everything = {(shard, row) for shard, rows in enumerate(shards) for row in range(rows)}
    assert {a.epoch for a in seen} == {epoch}
    assert len({(a.shard, a.row) for a in seen}) == len(seen)
    assert {(a.shard, a.row) for a in seen} <= everything
    assert len(everything) - len(seen) == sum(shards) % lanes


def test_the_dropped_rows_are_the_last_of_the_epochs_order() -> None:
    """And another epoch drops others: over many epochs no row is missing."""
    dropped = []
    for epoch in range(12):
        seen = {(a.shard, a.row) for a in epoch_of(ORDER, epoch)}
        (left,) = {(s, r) for s, rows in enumerate(SHARDS) for r in range(rows)} - seen
        dropped.append(left)
    assert len(set(dropped)) > 6


def test_lanes_read_equal_contiguous_stretches() -> None:
    """A lane stays in a shard until it has read its part of it, so that few shards are open at once."""
    rows = epoch_of(ORDER, 0)
    stretches = [rows[lane::LANES] for lane in range(LANES)]
    assert {len(stretch) for stretch in stretches} == {ORDER.rows_per_lane}
    laid_end_to_end = [a.shard for stretch in stretches for a in stretch]
    changes = sum(a != b for a, b in pairwise(laid_end_to_end))
    assert changes == len(set(laid_end_to_end)) - 1


def test_epochs_and_seeds_have_different_orders() -> None:
    def order_of(seed: int, epoch: int) -> tuple[tuple[int, int], ...]:
        return tuple((a.shard, a.row) for a in epoch_of(Order(SHARDS, LANES, seed), epoch))

    assert len({order_of(seed, epoch) for seed in (1, 2, 3) for epoch in (0, 1, 2)}) == 9
    one_shard = {
        tuple(a.row for a in epoch_of(Order((40,), LANES, seed), epoch)) for seed in (1, 2) for epoch in (0, 1)
    }
    assert len(one_shard) == 4
    assert tuple(range(40)) not in one_shard


def test_shards_of_equal_length_are_permuted_apart() -> None:
    order = Order((32, 32), 1, seed=1)
    rows = epoch_of(order, 0)
    assert [a.row for a in rows[:32]] != [a.row for a in rows[32:]]


def test_a_far_row_is_found_at_once_and_the_same_from_anywhere() -> None:
    g = 10**9
    used = Order(SHARDS, LANES, seed=1)
    for near in range(300):
        used.locate(near)
    start = time.perf_counter()
    address = Order(SHARDS, LANES, seed=1).locate(g)
    assert time.perf_counter() - start < 0.5
    ordering._epoch_shards.cache_clear()
    ordering._shard_order.cache_clear()
    assert used.locate(g) == address == Order(SHARDS, LANES, seed=1).locate(g)
    assert address.epoch == g // ORDER.rows_per_epoch


def test_golden_order() -> None:
    """The order must never change by accident: runs that are under way would see other data after an update."""
    golden = {
        0: (0, 2, 1),
        1: (0, 2, 2),
        2: (0, 2, 15),
        7: (0, 3, 5),
        8: (0, 2, 28),
        111: (0, 6, 3),
        112: (1, 2, 23),
        1000: (8, 5, 14),
        10**9: (8928571, 5, 12),
    }
    assert {g: (a.epoch, a.shard, a.row) for g in golden for a in [ORDER.locate(g)]} == golden
    assert [row_random(1, g).randint(0, 99) for g in (0, 1, 2, 10**9)] == [84, 7, 4, 85]


def test_row_random_belongs_to_the_row() -> None:
    assert row_random(1, 5).random() == row_random(1, 5).random()
    assert len({row_random(seed, g).random() for seed in (1, 2) for g in range(100)}) == 200


def test_only_the_standard_library_is_imported() -> None:
    tree = ast.parse(Path(ordering.__file__).read_text("utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or "."] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert imported <= sys.stdlib_module_names
