import ast
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data_pipeline
from data_pipeline import epochs
from data_pipeline.errors import ShardError
from data_pipeline.ordering import Order, Quarantine, RowAddress, first_hash, roll, row_random, rows_of_rank

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


def test_a_far_row_is_the_same_from_anywhere() -> None:
    g = 10**9
    used = Order(SHARDS, LANES, seed=1)
    for near in range(300):
        used.locate(near)
    address = Order(SHARDS, LANES, seed=1).locate(g)
    assert used.locate(g) == address == Order(SHARDS, LANES, seed=1).locate(g)
    assert address.epoch == g // ORDER.rows_per_epoch


def test_golden_order() -> None:
    """The order must never change by accident: runs that are under way would see other data after an update."""
    golden = {
        0: (0, 2, 5),
        1: (0, 2, 6),
        2: (0, 2, 18),
        7: (0, 3, 3),
        8: (0, 2, 1),
        111: (0, 6, 11),
        112: (1, 2, 6),
        1000: (8, 5, 42),
        10**9: (8928571, 5, 8),
    }
    assert {g: (a.epoch, a.shard, a.row) for g in golden for a in [ORDER.locate(g)]} == golden
    assert [row_random(1, g).randint(0, 99) for g in (0, 1, 2, 10**9)] == [84, 7, 4, 85]


def test_row_random_belongs_to_the_row() -> None:
    assert row_random(1, 5).random() == row_random(1, 5).random()
    assert len({row_random(seed, g).random() for seed in (1, 2) for g in range(100)}) == 200


@pytest.mark.parametrize("module", ["permutation", "pattern", "epochs", "ordering", "ledger", "errors"])
def test_only_the_standard_library_is_imported(module: str) -> None:
    tree = ast.parse((Path(data_pipeline.__file__).parent / f"{module}.py").read_text("utf-8"))
    imported = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or "."] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    ours = {f"data_pipeline.{name}" for name in ("permutation", "pattern", "epochs", "ordering", "errors")}
    assert {name.split(".")[0] for name in imported - ours} <= sys.stdlib_module_names


def test_a_far_row_costs_no_more_than_a_near_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One permutation of the shards, and one walk for the row, wherever it is."""
    made: list[int] = []
    walked: list[int] = []
    permutation, permuted = epochs.permutation, epochs.permuted
    monkeypatch.setattr(epochs, "permutation", lambda n, label: made.append(n) or permutation(n, label))
    monkeypatch.setattr(epochs, "permuted", lambda i, n, keys: walked.append(n) or permuted(i, n, keys))
    for g in (0, 10**9, 10**15):
        made.clear()
        walked.clear()
        Order(SHARDS, LANES, seed=1).locate(g)
        assert (len(made), len(walked)) == (1, 1)


def test_neighbouring_epochs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    permutation = epochs.permutation
    monkeypatch.setattr(epochs, "permutation", lambda n, label: made.append(label) or permutation(n, label))
    order = Order(SHARDS, LANES, seed=1)
    for g in range(3 * order.rows_per_epoch):
        order.locate(g)
    assert len(made) == 3


def test_a_quarantined_shard_leaves_its_rows_empty_and_moves_nothing() -> None:
    n = 2 * ORDER.rows_per_epoch
    plain = [ORDER.locate(g) for g in range(n)]
    start = 40
    order = Order(SHARDS, LANES, seed=1, quarantines=(Quarantine(5, start),))
    found = [order.locate(g) for g in range(n)]
    assert [a._replace(quarantined=False) for a in found] == plain
    assert [a.quarantined for a in found] == [g >= start and a.shard == 5 for g, a in enumerate(plain)]
    assert 0 < sum(a.quarantined for a in found) < sum(a.shard == 5 for a in plain)


def test_a_split_with_fewer_rows_than_lanes() -> None:
    with pytest.raises(ShardError, match=r"^the training split has 7 rows, fewer than data\.lanes=8; use fewer lanes"):
        Order((3, 4), LANES, seed=1).check()
    Order((4, 4), LANES, seed=1).check()


START = first_hash("of the shards", "rows-48x96", SHARDS)


def test_the_rolling_hash_depends_on_the_rows_alone() -> None:
    """Two runs saw the same data if and only if it agrees, whatever their steps, and whoever sums which part."""
    n = ORDER.rows_per_epoch + 40
    by_size = set()
    for rows_per_step in (n, 8, 1):
        rolled = START
        for start in range(0, n, rows_per_step):
            rolled = roll(rolled, ORDER, range(start, min(start + rows_per_step, n)))
        by_size.add(rolled)
    by_size.add(roll(roll(START, ORDER, range(1, n, 2)), ORDER, range(0, n, 2)))
    assert len(by_size) == 1


def test_every_row_has_its_own_identity() -> None:
    n = 2 * ORDER.rows_per_epoch
    assert len({roll(START, ORDER, [g]) for g in range(n)}) == n


def test_the_rolling_hash_tells_rows_apart() -> None:
    other, same = Order(SHARDS, LANES, seed=2), Order(SHARDS, LANES, seed=1)
    shard = ORDER.locate(3).shard
    without = Order(SHARDS, LANES, seed=1, quarantines=(Quarantine(shard, 3),))
    hashes = {
        START,
        roll(START, ORDER, range(16)),
        roll(START, ORDER, range(15)),
        roll(START, ORDER, range(1, 17)),
        roll(START, other, range(16)),
        roll(START, without, range(16)),
        roll(roll(START, other, range(16)), ORDER, range(16, 32)),
        roll(roll(START, ORDER, range(16)), ORDER, range(16, 32)),
        roll(first_hash("of others", "rows-48x96", SHARDS), ORDER, range(16)),
        roll(first_hash("of the shards", "rows-48x97", SHARDS), ORDER, range(16)),
        roll(first_hash("of the shards", "rows-48x96", SHARDS[:-1]), ORDER, range(16)),
    }
    assert len(hashes) == 11
    assert roll(START, ORDER, range(16)) == roll(START, same, range(16))
    assert roll(START, without, range(3)) == roll(START, ORDER, range(3))


def test_golden_rolling_hash() -> None:
    assert roll(START, ORDER, range(100)) == "716014e5f6d4a41edf9010380fb741f97f016da46e968fa919f94a00338c2761"


def test_many_ranks_and_shards() -> None:
    """A world of 4,096 ranks shares out its first step of 100,000 shards; every lane starts at its stretch."""
    lanes = 4096
    rows = tuple(1 + i % 1000 for i in range(100_000))
    order = Order(rows, lanes, seed=1)
    planned = {g: order.locate(g) for rank in range(lanes) for g in rows_of_rank(0, lanes, rank, lanes)}
    assert sorted(planned) == list(range(lanes))
    assert len({(a.shard, a.row) for a in planned.values()}) == lanes
    assert all(a.row < rows[a.shard] for a in planned.values())
