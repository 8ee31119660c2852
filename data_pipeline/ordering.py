"""The order of the data as a pure function: row g of a run depends on the row plan, the seed, the mix and g alone.

Row g belongs to lane g mod L and is that lane's turn number g // L. Without a mix all shards are one pool, and a lane
takes the pool's rows of its stretch one after the other (`epochs.py`). With a mix every source is a pool of its own,
and a pattern of exact shares says which of them a lane takes in each turn (`pattern.py`): the k-th time that a lane
takes a source it gets row k of its stretch of that source, whatever the mix was before. Rank r of W reads the lanes
congruent to r modulo W.

Standard library only.
"""

import hashlib
import random
import sys
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from data_pipeline.epochs import Pool
from data_pipeline.errors import ShardError
from data_pipeline.pattern import Pattern


class RowAddress(NamedTuple):
    """Where a row stands.

    Attributes:
        epoch: of its source, or of the run where sources are not mixed.
        shard: index in the split's list of shards. row: within the shard's row plan.
        source: name of the shard's source. quarantined: the row is left empty: its shard cannot be read, or the run
            leaves the row out.
    """

    epoch: int
    shard: int
    row: int
    source: str = ""
    quarantined: bool = False


@dataclass(frozen=True)
class Stage:
    """A mix that holds from row `from_row` of the run on: (source, whole-numbered weight) of each source."""

    from_row: int
    weights: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Quarantine:
    """A shard that cannot be read: rows of the run from `from_row` on that fall in it are left empty."""

    shard: int
    from_row: int


@dataclass(frozen=True)
class EmptyRows:
    """Rows `from_row` to `to_row`, which is not one of them, of the run are left empty, whatever they held."""

    from_row: int
    to_row: int


@dataclass(frozen=True)
class Order:
    """The order of the rows of one split.

    Attributes:
        shard_rows: rows of each shard, in the manifest's order.
        lanes: number of lanes L.
        seed: the data seed.
        sources: source of each shard; none: they have no names.
        stages: mixes in the order of their rows, the first from row 0; none: all shards are one pool.
        quarantines: shards that cannot be read.
        empty_rows: rows that the run leaves out; the stretches do not touch and stand in the order of the rows.
    """

    shard_rows: tuple[int, ...]
    lanes: int
    seed: int
    sources: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()
    quarantines: tuple[Quarantine, ...] = ()
    empty_rows: tuple[EmptyRows, ...] = ()

    def check(self) -> None:
        """Raises ShardError where the mix names a source that is not there, or a pool has too few rows."""
        for number, stage in enumerate(self.stages):
            for name in dict(stage.weights).keys() - set(self.sources):
                known = ", ".join(sorted(set(self.sources))) or "no sources with names"
                raise ShardError(f"data.mix.{number}.weights: no source {name}; the training split has {known}")
        for name, pool in self.pools.items():
            if not pool.rows_per_lane:
                what = f"source {name} of the training split" if name else "the training split"
                raise ShardError(
                    f"{what} has {pool.rows} rows, fewer than data.lanes={self.lanes}; "
                    "use fewer lanes, shorter rows or more text"
                )

    @cached_property
    def pools(self) -> dict[str, Pool]:
        """The pool of every source that is mixed, by name; or one pool of all shards, named ""."""
        if not self.stages:
            return {"": Pool(range(len(self.shard_rows)), self.shard_rows, self.lanes, str(self.seed))}
        shards: dict[str, list[int]] = {name: [] for stage in self.stages for name, _ in stage.weights}
        for shard, name in enumerate(self.sources):
            if name in shards:
                shards[name].append(shard)
        return {n: Pool(s, self.shard_rows, self.lanes, f"{self.seed} {n}") for n, s in sorted(shards.items())}

    @property
    def rows_per_lane(self) -> int:
        """Rows that each lane reads in one epoch, where sources are not mixed."""
        return self.pools[""].rows_per_lane

    @property
    def rows_per_epoch(self) -> int:
        """Rows that a run reads in one epoch, where sources are not mixed."""
        return self.rows_per_lane * self.lanes

    def locate(self, g: int) -> RowAddress:
        """Address of row `g` of the run, in a time that does not depend on `g`."""
        turn, lane = divmod(g, self.lanes)
        name = self._source(turn, lane) if self.stages else ""
        epoch, shard, row = self.pools[name].locate(lane, self.drawn(name, lane, turn))
        source = self.sources[shard] if self.sources else ""
        return RowAddress(epoch, shard, row, source, self.is_unreadable(g, shard) or self.leaves_out(g))

    def is_unreadable(self, g: int, shard: int) -> bool:
        """Whether row `g`, which falls in `shard`, is left empty because that cannot be read."""
        return g >= self._unreadable_from.get(shard, g + 1)

    def leaves_out(self, g: int) -> bool:
        """Whether row `g` is one of those that the run leaves out, whatever its shard."""
        nth = bisect_right(self._empty_from, g)
        return nth > 0 and g < self.empty_rows[nth - 1].to_row

    def drawn(self, name: str, lane: int, turn: int) -> int:
        """How many rows of a pool a lane takes before a turn."""
        if not self.stages:
            return turn
        return sum(
            pattern.count(name, lane, min(turn, end) - start) for start, end, pattern in self._spans if turn > start
        )

    def _source(self, turn: int, lane: int) -> str:
        start, _, pattern = self._spans[bisect_right(self._starts, turn) - 1]
        return pattern.source(lane, turn - start)

    @cached_property
    def _starts(self) -> list[int]:
        assert not any(stage.from_row % self.lanes for stage in self.stages), "a mix begins with a turn"
        return [stage.from_row // self.lanes for stage in self.stages]

    @cached_property
    def _spans(self) -> list[tuple[int, int, Pattern]]:
        """First turn, the turn after the last, and pattern of every stage."""
        ends = [*self._starts[1:], sys.maxsize]
        patterns = [Pattern(stage.weights, self.lanes) for stage in self.stages]
        return list(zip(self._starts, ends, patterns, strict=True))

    @cached_property
    def _unreadable_from(self) -> dict[int, int]:
        return {q.shard: q.from_row for q in self.quarantines}

    @cached_property
    def _empty_from(self) -> list[int]:
        return [rows.from_row for rows in self.empty_rows]


@dataclass(frozen=True)
class Share:
    """Which part of every step one rank reads: `rows_per_step` in all, `micro_batches` of the rank's own rows."""

    rows_per_step: int
    micro_batches: int
    rank: int
    world: int

    def check(self, lanes: int) -> None:
        """Raises ShardError where lanes, ranks and batch do not fit."""
        if lanes % self.world:
            raise ShardError(f"data.lanes={lanes} is not a multiple of {self.world} ranks; change one of them")
        if self.rows_per_step % lanes:
            raise ShardError(f"training.batch_rows={self.rows_per_step} is not a multiple of data.lanes={lanes}")
        if self.rows_per_step // self.world % self.micro_batches:
            raise ShardError(
                f"training.batch_rows={self.rows_per_step} over {self.world} ranks does not divide into "
                f"training.accumulation_steps={self.micro_batches}"
            )


def rows_of_rank(step: int, rows_per_step: int, rank: int, world: int) -> range:
    """The rows of one step that rank `rank` of `world` reads; `world` divides the lanes and those `rows_per_step`."""
    return range(step * rows_per_step + rank, (step + 1) * rows_per_step, world)


def row_random(seed: int, g: int) -> random.Random:
    """The random generator that belongs to row `g`, the same in every run with this seed."""
    return random.Random(f"row {seed} {g}")


def first_hash(manifest_hash: str, plan_name: str, shard_rows: Iterable[int]) -> str:
    """The rolling hash before the first row: of the shards and of their row plan."""
    return hashlib.sha256(f"{manifest_hash} {plan_name} {list(shard_rows)}".encode()).hexdigest()


def roll(rolling_hash: str, order: Order, rows: Iterable[int]) -> str:
    """The rolling hash after consuming `rows` too: two runs consumed the same rows if and only if it agrees.

    It is a sum over the rows, so it does not depend on how they make up steps, and parts can be summed apart.
    """
    return advance(rolling_hash, identity_sum({g: order.locate(g) for g in rows}))


def identity_sum(rows: Mapping[int, RowAddress]) -> int:
    """What consuming `rows`, addresses by number, adds to the rolling hash: of each the number and what it held."""
    total = 0
    for g, address in rows.items():
        identity = f"{g} {address.shard} {address.row}{' empty' if address.quarantined else ''}"
        total += int.from_bytes(hashlib.sha256(identity.encode()).digest())
    return total


def advance(rolling_hash: str, added: int) -> str:
    """The rolling hash with an `identity_sum` added."""
    return f"{(int(rolling_hash, 16) + added) % (1 << 256):064x}"
