"""Several sources: exact shares, stage changes, and what the ledger says of them."""

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.errors import ShardError
from data_pipeline.ledger import Ledger
from data_pipeline.mixing import MixStage, stages_of, whole_weights
from data_pipeline.ordering import EmptyRows, Order, Quarantine, RowAddress, Stage, rows_of_rank
from data_pipeline.pattern import Pattern
from data_pipeline.shards import DataConfig

LANES = 24
SHARDS = (40, 31, 0, 77, 25, 60, 1, 90)
SOURCES = ("a", "b", "a", "b", "c", "a", "c", "b")
STAGES = (
    Stage(0, (("a", 7), ("b", 3))),
    Stage(LANES * 5, (("a", 1), ("b", 1), ("c", 1))),
    Stage(LANES * 6, (("c", 1),)),
    Stage(LANES * 13, (("b", 5), ("c", 2))),
)
MIXED = Order(SHARDS, LANES, 1, SOURCES, STAGES)
ROWS = 40 * LANES

patterns = st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 30))


def pattern_of(weights: list[int], lanes: int) -> tuple[Pattern, dict[str, int]]:
    named = {f"source-{i}": weight for i, weight in enumerate(weights)}
    return Pattern(list(named.items()), lanes), named


@given(patterns, st.integers(0, 200))
def test_a_lane_takes_exact_shares_over_every_period(drawn: tuple[list[int], int], turn: int) -> None:
    pattern, weights = pattern_of(*drawn)
    for lane in (0, drawn[1] - 1):
        taken = Counter(pattern.source(lane, turn + i) for i in range(pattern.period))
        assert taken == Counter(weights)


@given(patterns, st.integers(0, 200))
def test_every_turn_is_mixed(drawn: tuple[list[int], int], turn: int) -> None:
    """Of the lanes of one turn each source has its share, rounded up or down."""
    pattern, weights = pattern_of(*drawn)
    lanes = drawn[1]
    taken = Counter(pattern.source(lane, turn) for lane in range(lanes))
    for name, weight in weights.items():
        assert abs(taken[name] - Fraction(lanes * weight, pattern.period)) < 1


@given(patterns)
def test_a_source_is_spread_over_the_turns(drawn: tuple[list[int], int]) -> None:
    pattern, weights = pattern_of(*drawn)
    for name, weight in weights.items():
        for turns in range(pattern.period):
            assert abs(pattern.count(name, 0, turns) - Fraction(turns * weight, pattern.period)) < 4


@given(patterns, st.integers(0, 300))
def test_counting_is_summing(drawn: tuple[list[int], int], turns: int) -> None:
    pattern, weights = pattern_of(*drawn)
    for lane in (0, drawn[1] // 2):
        taken = Counter(pattern.source(lane, turn) for turn in range(turns))
        assert {name: pattern.count(name, lane, turns) for name in weights} == {n: taken[n] for n in weights}
    assert pattern.count("another", 0, turns) == 0


mixes = st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(1, 9), min_size=1), min_size=1, max_size=4)


@given(mixes, st.lists(st.integers(1, 20), min_size=3, max_size=3), st.sampled_from([1, 2, 24]), st.integers(0, 3))
def test_no_stage_change_repeats_or_skips_a_row(
    mix: list[dict[str, int]], lengths: list[int], lanes: int, seed: int
) -> None:
    """Lane by lane the rows of a source are those that it would have without a mix, whatever the stages were."""
    turns = [0, *(sum(lengths[: i + 1]) for i in range(len(mix) - 1))]
    stages = tuple(Stage(t * lanes, tuple(sorted(w.items()))) for t, w in zip(turns, mix, strict=True))
    order = Order(SHARDS, lanes, seed, SOURCES, stages)
    for lane in {0, lanes - 1}:
        seen: dict[str, list[RowAddress]] = {}
        for turn in range(sum(lengths) + 40):
            address = order.locate(turn * lanes + lane)
            seen.setdefault(address.source, []).append(address)
        for name, addresses in seen.items():
            alone = Order(SHARDS, lanes, seed, SOURCES, (Stage(0, ((name, 1),)),))
            assert addresses == [alone.locate(k * lanes + lane) for k in range(len(addresses))]


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_source_gives_every_row_once_per_epoch(name: str) -> None:
    """But for the few that its epoch drops; also where the lanes end an epoch at different turns."""
    order = Order(SHARDS, LANES, 1, SOURCES, (Stage(0, ((name, 3), ("a" if name != "a" else "b", 4))),))
    by_epoch: dict[int, list[tuple[int, int]]] = {}
    for g in range(4 * order.pools[name].rows * 3):
        address = order.locate(g)
        if address.source == name:
            by_epoch.setdefault(address.epoch, []).append((address.shard, address.row))
    everything = {(s, r) for s, rows in enumerate(SHARDS) if SOURCES[s] == name for r in range(rows)}
    for epoch in range(3):
        assert len(set(by_epoch[epoch])) == len(by_epoch[epoch]) == len(everything) - len(everything) % LANES
        assert set(by_epoch[epoch]) <= everything


def test_shares_are_those_of_the_stage() -> None:
    taken = Counter(MIXED.locate(g).source for g in range(LANES * 13, LANES * (13 + 7)))
    assert taken == {"b": LANES * 5, "c": LANES * 2}
    assert {MIXED.locate(g).source for g in range(LANES * 6, LANES * 13)} == {"c"}
    assert {MIXED.locate(g).source for g in range(LANES * 5)} == {"a", "b"}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("turns_per_step", [1, 3])
def test_every_world_sees_the_same_rows_in_every_step(world: int, accumulation: int, turns_per_step: int) -> None:
    rows_per_step = turns_per_step * LANES
    for step in range(ROWS // rows_per_step):
        seen: list[RowAddress] = []
        for rank in range(world):
            rows, order = rows_of_rank(step, rows_per_step, rank, world), Order(SHARDS, LANES, 1, SOURCES, STAGES)
            size = -(-len(rows) // accumulation)
            seen += [order.locate(g) for i in range(0, len(rows), size) for g in rows[i : i + size]]
        assert Counter(seen) == Counter(
            MIXED.locate(g) for g in range(step * rows_per_step, (step + 1) * rows_per_step)
        )


def test_a_rank_opens_only_the_shards_of_its_lanes() -> None:
    """The rows of a source that a lane reads in an epoch lie side by side."""
    order = Order((1000,) * 12, LANES, 1, ("a", "b") * 6, (Stage(0, (("a", 1), ("b", 1))),))
    for lane in range(LANES):
        shards = {order.locate(turn * LANES + lane).shard for turn in range(250)}
        assert len(shards) <= 4


def test_golden_mix() -> None:
    """The order must never change by accident."""
    golden = {
        0: (0, 0, 4, "a", False),
        1: (0, 0, 21, "a", False),
        2: (0, 0, 5, "a", False),
        23: (0, 7, 71, "b", False),
        24: (0, 3, 16, "b", False),
        119: (0, 7, 24, "b", False),
        120: (0, 0, 11, "a", False),
        143: (0, 4, 12, "c", False),
        144: (0, 6, 0, "c", False),
        312: (0, 3, 74, "b", False),
        10**9: (3720237, 3, 47, "b", False),
    }
    assert {g: tuple(MIXED.locate(g)) for g in golden} == golden


def test_a_far_row_and_many_stages() -> None:
    stages = tuple(Stage(i * LANES * 1000, (("a", 1 + i % 5), ("b", 3))) for i in range(100))
    order = Order(SHARDS, LANES, 1, SOURCES, stages)
    lane, g = 5, 10**9 * LANES + 5
    address = order.locate(g)
    taken = sum(
        Pattern(stage.weights, LANES).count(address.source, lane, 1000 if i < 99 else 10**9 - 99_000)
        for i, stage in enumerate(stages)
    )
    assert order.drawn(address.source, lane, 10**9) == taken
    assert address.epoch == taken // order.pools[address.source].rows_per_lane


def counted(order: Order, rows: int) -> dict[str, tuple[int, int, int]]:
    """Rows, repeats and empty rows of every source, by walking."""
    seen = [order.locate(g) for g in range(rows)]
    return {
        name: (
            sum(a.source == name for a in seen),
            sum(a.source == name and a.epoch > 0 for a in seen),
            sum(a.source == name and a.quarantined for a in seen),
        )
        for name in sorted(set(order.sources))
    }


QUARANTINES = (Quarantine(3, 200), Quarantine(0, 311), Quarantine(4, 10**9))


@pytest.mark.parametrize("stages", [STAGES, STAGES[:1], ()])
@pytest.mark.parametrize("quarantines", [(), QUARANTINES])
@pytest.mark.parametrize("empty_rows", [(), (EmptyRows(96, 192), EmptyRows(193, 337), EmptyRows(10**6, 10**6 + 8))])
@pytest.mark.parametrize("lanes", [1, 8, 24])
def test_the_ledger_is_what_walking_counts(
    stages: tuple[Stage, ...], quarantines: tuple[Quarantine, ...], empty_rows: tuple[EmptyRows, ...], lanes: int
) -> None:
    order = Order(SHARDS, lanes, 1, SOURCES, stages, quarantines, empty_rows)
    ledger = Ledger(order)
    for rows in (0, 1, lanes, 199, 200, 201, 500, 1111):
        uses = ledger.at(rows)
        assert {u.source: (u.rows, u.repeats, u.quarantined) for u in uses} == counted(order, rows)
        for use in uses:
            total = sum(n for n, source in zip(SHARDS, SOURCES, strict=True) if source == use.source)
            assert use.epochs == pytest.approx(use.rows / total, rel=0.5)


def test_a_whole_round_is_one_epoch() -> None:
    order = Order(SHARDS, LANES, 1, SOURCES, (Stage(0, (("a", 1),)),))
    (a, b, c) = Ledger(order).at(3 * order.pools["a"].rows_per_lane * LANES)
    assert (a.epochs, a.repeats) == (3.0, 2 * a.rows // 3)
    assert (b.rows, b.epochs, c.rows) == (0, 0.0, 0)
    (everything,) = Ledger(Order((5, 6), 4, seed=1)).at(16)
    assert everything.source == "all"
    assert (everything.rows, everything.epochs, everything.repeats) == (16, 2.0, 8)
    assert "16 rows (2.00 epochs, 8 repeated)" in everything.as_text()


def test_weights_become_whole_numbers() -> None:
    assert whole_weights({"b": 0.3, "a": 0.7}) == {"a": 7, "b": 3}
    assert whole_weights({"a": 70, "b": 30.0, "c": 0}) == {"a": 7, "b": 3}
    assert whole_weights({"a": 1e-3, "b": 0.999}) == {"a": 1, "b": 999}
    assert whole_weights({"only": 0.123}) == {"only": 1}


def test_stages_begin_with_a_step() -> None:
    mix = [MixStage(weights={"a": 1}), MixStage(from_step=3, weights={"a": 0.5, "b": 1.5})]
    assert stages_of(mix, 48) == (Stage(0, (("a", 1),)), Stage(144, (("a", 1), ("b", 3))))


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        ([{"from_step": 3, "weights": {"a": 1}}], "the first stage begins at step 3"),
        (
            [{"weights": {"a": 1}}, {"from_step": 9, "weights": {"a": 1}}, {"from_step": 9, "weights": {"b": 1}}],
            "a stage from step 9 follows one from step 9; put them in order",
        ),
        ([{"weights": {}}], "at least 1 item"),
        ([{"weights": {"a": 0, "b": 0.0}}], "at least one weight must be more than 0"),
        ([{"weights": {"a": 2, "b": -1}}], "the weight of b must be 0 or more"),
        ([{"weights": {"a": float("nan")}}], "the weight of a must be 0 or more, and finite"),
        ([{"weights": {"a": float("inf")}}], "the weight of a must be 0 or more, and finite"),
        ([{"weights": {"a": 0.12345, "b": 0.5}}], "add up to 12,469, more than 10,000: round them to fewer digits"),
        ([{"weights": {"a": 1}, "until": 3}], "Extra inputs"),
    ],
)
def test_mixes_that_make_no_sense(mix: list[dict[str, Any]], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DataConfig(shards="shards", row_tokens=8, row_chars=8, mix=mix)  # type: ignore[arg-type]
    assert expected in str(caught.value)


def test_mixes_that_the_shards_cannot_give() -> None:
    unknown = (Stage(0, (("a", 1),)), Stage(LANES, (("a", 1), ("d", 1))))
    with pytest.raises(ShardError, match=r"^data\.mix\.1\.weights: no source d; the training split has a, b, c$"):
        Order(SHARDS, LANES, 1, SOURCES, unknown).check()
    with pytest.raises(ShardError, match=r"has no sources with names$"):
        Order(SHARDS, LANES, 1, (), unknown).check()
    with pytest.raises(ShardError, match=r"^source c of the training split has 26 rows, fewer than data\.lanes=32"):
        Order(SHARDS, 32, 1, SOURCES, (Stage(0, (("a", 9), ("c", 1))),)).check()
    MIXED.check()
