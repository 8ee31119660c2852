"""What a run has used of each source, as a function of the rows consumed. Standard library only."""

from dataclasses import dataclass

from data_pipeline.ordering import Order

ALL = "all"  # the name of everything, where shards have no sources


@dataclass(frozen=True)
class SourceUse:
    """What a run has used of one source.

    Attributes:
        rows: consumed. epochs: the same in rounds of the source. repeats: rows beyond the first epoch.
        quarantined: how many of `rows` were left empty: their shard could not be read, or the run left them out.
    """

    source: str
    rows: int
    epochs: float
    repeats: int
    quarantined: int

    def as_text(self) -> str:
        """The figures of a line for people."""
        text = f"{self.source} {self.rows:,} rows ({self.epochs:.2f} epochs, {self.repeats:,} repeated"
        return text + (f", {self.quarantined:,} left empty)" if self.quarantined else ")")


class Ledger:
    """The ledger of an order: `at(rows)` says what the first `rows` rows of the run used of each source."""

    def __init__(self, order: Order):
        self._order = order
        names = sorted(set(order.sources)) or [ALL]
        self._shards: dict[str, frozenset[int]] = {
            name: frozenset(s for s in range(len(order.shard_rows)) if name == ALL or order.sources[s] == name)
            for name in names
        }

    def at(self, rows: int) -> list[SourceUse]:
        """Of every source, by name."""
        return [self._use(name, rows) for name in self._shards]

    def _use(self, name: str, rows: int) -> SourceUse:
        order, shards = self._order, self._shards[name]
        pool_name = name if order.stages else ""
        if pool_name not in order.pools:  # no stage of the mix asks for it
            return SourceUse(name, 0, 0.0, 0, 0)
        pool, offsets = order.pools[pool_name], self._offsets(pool_name, rows)
        used = pool.rows_drawn(offsets, shards)
        first = pool.rows_drawn([min(offset, pool.rows_per_lane) for offset in offsets], shards)
        # What an epoch drops counts as used up in proportion, so that a pool's whole round is one epoch.
        per_epoch = sum(order.shard_rows[s] for s in shards) * pool.rows_per_lane * pool.lanes / max(pool.rows, 1)
        return SourceUse(name, used, used / max(per_epoch, 1), used - first, self._empty(pool_name, shards, rows))

    def _empty(self, pool: str, shards: frozenset[int], rows: int) -> int:
        """How many of the first `rows` rows of the run that fall in `shards` were left empty."""
        unreadable = [q for q in self._order.quarantines if q.shard in shards]

        def of_bad_shards(start: int, end: int) -> int:
            stretches = ((frozenset([q.shard]), max(start, q.from_row)) for q in unreadable)
            return sum(self._between(pool, shard, first, end) for shard, first in stretches)

        left_out = ((stretch.from_row, min(stretch.to_row, rows)) for stretch in self._order.empty_rows)
        total = of_bad_shards(0, rows)
        return total + sum(self._between(pool, shards, a, b) - of_bad_shards(a, b) for a, b in left_out)

    def _between(self, pool: str, shards: frozenset[int], start: int, end: int) -> int:
        """How many rows from `start` to `end` of the run fall in `shards`; 0 where `end` is not after `start`."""
        if end <= start:
            return 0
        drawn = self._order.pools[pool].rows_drawn
        return drawn(self._offsets(pool, end), shards) - drawn(self._offsets(pool, start), shards)

    def _offsets(self, pool: str, rows: int) -> list[int]:
        """Rows of a pool that each lane took among the first `rows` rows of the run."""
        turns, rest = divmod(rows, self._order.lanes)
        return [self._order.drawn(pool, lane, turns + (lane < rest)) for lane in range(self._order.lanes)]
