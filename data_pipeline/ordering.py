"""The order of the data as a pure function: row g of a run depends on the row plan, the seed and g, on nothing else.

Row g belongs to lane g mod L. Each epoch permutes the shards, lays their rows end to end and gives every lane an
equal contiguous stretch; inside a shard the rows are permuted. The last `total mod L` rows of an epoch's order are
dropped; each epoch's permutation drops others. Rank r of W reads the lanes congruent to r modulo W.

Standard library only.
"""

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate


@dataclass(frozen=True)
class RowAddress:
    """Where a row stands: `epoch` of the run, `shard` and `row` within the shard's row plan."""

    epoch: int
    shard: int
    row: int


@dataclass(frozen=True)
class Order:
    """The order of the rows of one split.

    Attributes:
        shard_rows: rows of each shard, in the manifest's order.
        lanes: number of lanes L.
        seed: the data seed.
    """

    shard_rows: tuple[int, ...]
    lanes: int
    seed: int

    @property
    def rows_per_lane(self) -> int:
        """Rows that each lane reads in one epoch."""
        return sum(self.shard_rows) // self.lanes

    @property
    def rows_per_epoch(self) -> int:
        """Rows that a run reads in one epoch."""
        return self.rows_per_lane * self.lanes

    def locate(self, g: int) -> RowAddress:
        """Address of row `g` of the run."""
        turn, lane = divmod(g, self.lanes)
        epoch, offset = divmod(turn, self.rows_per_lane)
        shards, ends = _epoch_shards(self.shard_rows, self.seed, epoch)
        place = lane * self.rows_per_lane + offset
        nth = bisect_right(ends, place)
        shard = shards[nth]
        start = ends[nth] - self.shard_rows[shard]
        return RowAddress(epoch, shard, _shard_order(self.shard_rows[shard], self.seed, epoch, shard)[place - start])


def rows_of_rank(step: int, rows_per_step: int, rank: int, world: int) -> range:
    """The rows of one step that rank `rank` of `world` reads; `world` divides the lanes and those `rows_per_step`."""
    return range(step * rows_per_step + rank, (step + 1) * rows_per_step, world)


def row_random(seed: int, g: int) -> random.Random:
    """The random generator that belongs to row `g`, the same in every run with this seed."""
    return random.Random(f"row {seed} {g}")


def _permutation(n: int, seed: str) -> list[int]:
    # Sorting by random() keys: the sequence of random() is guaranteed across Python versions, that of shuffle() is not.
    rng = random.Random(seed)
    keys = [rng.random() for _ in range(n)]
    return sorted(range(n), key=keys.__getitem__)


@lru_cache(maxsize=4)
def _epoch_shards(shard_rows: Sequence[int], seed: int, epoch: int) -> tuple[list[int], list[int]]:
    """The shards of one epoch in order, and the running total of their rows."""
    shards = _permutation(len(shard_rows), f"shards {seed} {epoch}")
    return shards, list(accumulate(shard_rows[s] for s in shards))


@lru_cache(maxsize=256)
def _shard_order(rows: int, seed: int, epoch: int, shard: int) -> list[int]:
    return _permutation(rows, f"rows {seed} {epoch} {shard}")
