"""When a step is bad, and what the record of bad steps says; without an engine."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.ordering import EmptyRows, Order, RowAddress, advance, first_hash, identity_sum, roll, rows_of_rank
from data_pipeline.quarantine import LeftOutRows, QuarantineRecord
from tidal_dist.settings import GuardConfig
from tidal_dist.training.bad_steps import NamedRow, worst_rows
from tidal_dist.training.guard import Guard

INF, NAN = math.inf, math.nan
positive = st.floats(1e-6, 1e6)


def guard_of(kept: dict[str, Any] | None = None, **settings: Any) -> Guard:
    return Guard(GuardConfig(**settings), {} if kept is None else kept)


def flags(guard: Guard, norms: list[float]) -> list[bool]:
    """Which of a run's steps are bad."""
    found = []
    for norm in norms:
        bad = guard.judge(1.0, norm)
        found.append(bad is not None)
        if bad is None:
            guard.accept(norm)
    return found


# --- what is bad ---


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_is_bad_from_the_first_step(value: float) -> None:
    for settings in ({}, {"spike_factor": None}):
        of_loss = guard_of(**settings).judge(value, 1.0)
        of_norm = guard_of(**settings).judge(1.0, abs(value))
        assert of_loss is not None
        assert of_norm is not None
        assert not of_loss.is_finite
        assert of_loss.why == f"the loss is {value}"
        assert of_norm.why == f"the gradient norm is {abs(value)}"


@given(positive, st.lists(st.floats(1.0, 20.0), min_size=1, max_size=100))
def test_norms_that_stay_within_a_factor_are_never_bad(level: float, noise: list[float]) -> None:
    assert not any(flags(guard_of(window_steps=16), [level * factor for factor in noise]))


@given(positive, st.lists(st.floats(0.1, 10.0), min_size=16, max_size=80), st.floats(1500.0, 1e9))
def test_a_spike_is_always_bad(level: float, noise: list[float], factor: float) -> None:
    """However uneven the norms before it were, and however often it comes: the guard does not get used to it."""
    kept: dict[str, Any] = {}
    guard = guard_of(kept, window_steps=16)
    for norm in noise:
        guard.accept(level * norm)
    spikes = [level * factor] * 20
    assert all(flags(guard, spikes))
    assert not any(flags(guard, [level * noise[-1]]))


def test_the_bound_is_robust() -> None:
    """A few outliers among those before, of either side, hardly move it; mean and deviation would follow."""
    steady = [1.0 + 0.01 * (i % 7) for i in range(28)]
    plain, troubled = guard_of(window_steps=32), guard_of(window_steps=32)
    for norm in [*steady, 1.0, 1.0, 1.0, 1.0]:
        plain.accept(norm)
    for norm in [*steady, 1e5, 1e-5, 1e6, 1e4]:
        troubled.accept(norm)
    assert troubled.bound() == pytest.approx(plain.bound(), rel=0.1)


def test_there_is_no_bound_before_there_is_enough_to_compare_with() -> None:
    guard = guard_of(window_steps=64)
    assert not any(flags(guard, [1.0] * 15 + [1e9]))
    assert guard.scalars()["guard/gradient_norm_bound"] == guard.bound() < 25
    assert flags(guard, [1e9]) == [True]
    assert not any(flags(guard_of(spike_factor=None), [1.0] * 200 + [1e30]))
    assert guard_of().scalars() == {}


def test_an_absurd_factor_is_no_bound() -> None:
    assert not any(flags(guard_of(spike_factor=1e9), [1.0] * 100 + [1e30]))


@given(st.lists(st.floats(0.0, 1e4), min_size=1, max_size=120), st.data())
def test_a_resumed_run_decides_the_same(norms: list[float], data: st.DataObject) -> None:
    """What is kept goes through JSON exactly."""
    at = data.draw(st.integers(0, len(norms)))
    straight = flags(guard_of(window_steps=8), norms)
    kept: dict[str, Any] = {}
    first = flags(guard_of(kept, window_steps=8), norms[:at])
    assert first + flags(guard_of(json.loads(json.dumps(kept)), window_steps=8), norms[at:]) == straight


def test_a_shorter_window_looks_at_the_last_norms() -> None:
    kept: dict[str, Any] = {"norms": [100.0] * 20 + [1.0] * 8}
    assert guard_of(kept, window_steps=8).bound() < 25
    assert kept["norms"] == [1.0] * 8


# --- which rows are named ---


def row(g: int, loss: float) -> NamedRow:
    return NamedRow(g, loss, [])


def test_rows_whose_own_loss_is_not_finite_are_named_first() -> None:
    found = worst_rows([row(1, 2.0), row(5, INF), row(3, NAN), row(2, 9.0)])
    assert [r.row for r in found] == [3, 5]


def test_else_those_of_the_largest_loss() -> None:
    found = worst_rows([row(g, float(g % 5)) for g in range(20)])
    assert [r.row for r in found] == [4, 9, 14]
    assert len(worst_rows([row(g, NAN) for g in range(20)])) == 8


# --- the record ---

LANES, BATCH = 4, 8
SHARDS = (17, 30, 9, 44)
ORDER = Order(SHARDS, LANES, seed=1)
START = first_hash("of the shards", "rows-48x96", SHARDS)
Parts = list[tuple[int, int, int]]


@st.composite
def stretches(draw: st.DrawFn) -> Parts:
    """First step, steps and rollbacks of what a run leaves out, one after the other: each ends where the run stands."""
    parts, here = [], 0
    for gap, back, rollbacks in draw(
        st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(0, 1)), max_size=5)
    ):
        here += gap
        first = max(0, here - back) if rollbacks else here - 1
        parts.append((first, here - first, rollbacks))
    return parts


def record_of(parts: Parts) -> QuarantineRecord:
    record = QuarantineRecord("h")
    for first, steps, rollbacks in parts:
        record = record.with_rows(LeftOutRows(first * BATCH, (first + steps) * BATCH, "why", rollbacks))
    return record


def with_empty(record: QuarantineRecord) -> Order:
    return Order(SHARDS, LANES, seed=1, empty_rows=record.empty_rows())


@given(stretches())
def test_rows_that_are_left_out_are_empty_and_nothing_moves(parts: Parts) -> None:
    record = record_of(parts)
    order = with_empty(record)
    expected = {g for first, steps, _ in parts for g in range(first * BATCH, (first + steps) * BATCH)}
    n = 24 * BATCH
    found = [order.locate(g) for g in range(n)]
    assert [a._replace(quarantined=False) for a in found] == [ORDER.locate(g) for g in range(n)]
    assert {g for g, a in enumerate(found) if a.quarantined} == expected
    assert {g for g in range(n) if record.why_empty(g)} == expected
    assert record.rollbacks == sum(rollbacks for *_, rollbacks in parts)
    ends = [edge for rows in order.empty_rows for edge in (rows.from_row, rows.to_row)]
    assert ends == sorted(set(ends))


@given(stretches(), st.integers(0, 20))
def test_what_concerns_a_checkpoint_does_not_depend_on_how_it_was_recorded(parts: Parts, step: int) -> None:
    """One by one, at once, or with what came later: the same for the rows before the checkpoint."""
    whole = record_of(parts)
    single = [(g // BATCH, 1, 0) for g in range(0, 20 * BATCH, BATCH) if whole.why_empty(g)]
    assert whole.before(step * BATCH) == record_of(single).before(step * BATCH)
    assert whole.before(step * BATCH) == record_of([s for s in single if s[0] < step]).before(step * BATCH)


@given(stretches())
def test_the_record_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, parts: Parts) -> None:
    folder = tmp_path_factory.mktemp("run")
    record_of(parts).write(folder)
    assert QuarantineRecord.load(folder, "h") == record_of(parts)


def test_a_record_without_rows_is_read(tmp_path: Path) -> None:
    (tmp_path / "quarantine.json").write_text(json.dumps({"format": 1, "manifest_hash": "h", "shards": []}))
    assert QuarantineRecord.load(tmp_path, "h") == QuarantineRecord("h")


def test_bad_rows_in_a_row() -> None:
    record = record_of([(3, 1, 0), (5, 1, 0), (6, 1, 0)])
    assert [record.bad_rows_before(step * BATCH) // BATCH for step in range(9)] == [0, 0, 0, 0, 1, 0, 1, 2, 0]
    # Where the run went back, what was bad before does not count any more; that it went back does.
    back = record.with_rows(LeftOutRows(4 * BATCH, 7 * BATCH, "back", 1))
    assert back.bad_rows_before(7 * BATCH) == 0
    again = back.with_rows(LeftOutRows(7 * BATCH, 8 * BATCH, "bad"))
    assert again.bad_rows_before(8 * BATCH) == BATCH
    assert again.with_rows(LeftOutRows(2 * BATCH, 8 * BATCH, "back", 1)).rollbacks == 2


@pytest.mark.slow
@given(
    st.lists(st.sampled_from(["made", "bad"]), min_size=1, max_size=16),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 4),
)
def test_the_rolling_hash_of_a_run_is_that_of_its_replay(outcomes: list[str], world: int, saved_every: int) -> None:
    """Whatever was bad, and wherever the run went back; on any number of ranks."""
    record, rolled, saved = QuarantineRecord("h"), START, (0, START)
    step, in_a_row = 0, 0
    for outcome in outcomes:
        rows = range(step * BATCH, (step + 1) * BATCH)
        read: dict[int, RowAddress] = {}
        for rank in range(world):
            read |= {g: with_empty(record).locate(g) for g in rows_of_rank(step, BATCH, rank, world)}
        if outcome == "bad":
            record = record.with_rows(LeftOutRows(rows.start, rows.stop, "bad"))
            rolled = roll(rolled, with_empty(record), rows)
        else:
            rolled = advance(rolled, identity_sum(read))
        step, in_a_row = step + 1, in_a_row + 1 if outcome == "bad" else 0
        assert (record.bad_rows_before(step * BATCH) // BATCH) == in_a_row
        if in_a_row == 3:
            record = record.with_rows(LeftOutRows(saved[0] * BATCH, step * BATCH, "back", 1))
            rolled = roll(saved[1], with_empty(record), range(saved[0] * BATCH, step * BATCH))
            in_a_row = 0
        elif step % saved_every == 0 and not in_a_row:
            saved = step, rolled
    assert rolled == roll(START, with_empty(record), range(step * BATCH))


def test_empty_rows_have_edges() -> None:
    order = Order(SHARDS, LANES, seed=1, empty_rows=(EmptyRows(8, 16), EmptyRows(24, 25)))
    assert [g for g in range(64) if order.locate(g).quarantined] == [*range(8, 16), 24]
