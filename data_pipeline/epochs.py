"""The rows of some shards, dealt to lanes, epoch after epoch. Standard library only.

Each epoch permutes the shards, lays their rows end to end and gives every lane an equal contiguous stretch; inside a
shard the rows are permuted. The last `rows mod L` rows of an epoch's order are dropped; each epoch drops others.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

from data_pipeline.permutation import keys_of, permutation, permuted

_EPOCHS_KEPT = 4  # lanes may stand on both sides of an epoch's end


class Epoch:
    """One epoch's order: `shards` as they lie end to end, and the running number of their rows, `ends`."""

    def __init__(self, shards: Sequence[int], shard_rows: Sequence[int], label: str):
        self.shards = [shards[i] for i in permutation(len(shards), label)]
        self.ends = list(accumulate(shard_rows[s] for s in self.shards))
        self._shard_rows = shard_rows
        self._running: dict[frozenset[int], list[int]] = {}

    def find(self, place: int) -> tuple[int, int]:
        """The shard at a place of the order, and how far it is from the shard's beginning."""
        nth = bisect_right(self.ends, place)
        shard = self.shards[nth]
        return shard, place - self.ends[nth] + self._shard_rows[shard]

    def rows_before(self, place: int, chosen: frozenset[int]) -> int:
        """How many of the first `place` rows are in the chosen shards."""
        if chosen not in self._running:
            self._running[chosen] = list(accumulate(self._shard_rows[s] * (s in chosen) for s in self.shards))
        nth = bisect_left(self.ends, place)
        missing = self.ends[nth] - place if self.shards[nth] in chosen else 0
        return self._running[chosen][nth] - missing


class Pool:
    """The rows of one source, or of all shards where sources are not mixed.

    Args:
        shards: their indices in `shard_rows`. shard_rows: rows of every shard of the split.
        lanes: number of lanes L. label: names the pool's permutations; seed and source are in it.
    """

    def __init__(self, shards: Sequence[int], shard_rows: Sequence[int], lanes: int, label: str):
        self.shards, self.lanes, self._shard_rows, self._label = shards, lanes, shard_rows, label
        self.rows = sum(shard_rows[s] for s in shards)
        self.rows_per_lane = self.rows // lanes
        self._epochs: dict[int, Epoch] = {}
        self._sums: dict[frozenset[int], list[int]] = {}

    def epoch(self, number: int) -> Epoch:
        """The order of one epoch; the last few are kept."""
        if number not in self._epochs:
            if len(self._epochs) >= _EPOCHS_KEPT:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[number] = Epoch(self.shards, self._shard_rows, f"shards {self._label} {number}")
        return self._epochs[number]

    def locate(self, lane: int, offset: int) -> tuple[int, int, int]:
        """Epoch, shard and row of the lane's row number `offset`, counted over all epochs."""
        number, within = divmod(offset, self.rows_per_lane)
        shard, i = self.epoch(number).find(lane * self.rows_per_lane + within)
        keys = keys_of(f"rows {self._label} {number} {shard}")
        return number, shard, permuted(i, self._shard_rows[shard], keys)

    def rows_drawn(self, offsets: Sequence[int], chosen: frozenset[int]) -> int:
        """How many rows of the chosen shards are among the first `offsets[lane]` rows of every lane."""
        if len(chosen) == len(self.shards):
            return sum(offsets)
        first, last = min(offsets) // self.rows_per_lane, max(offsets) // self.rows_per_lane
        total = self._drawn_in_epochs(first, chosen)
        for number in range(first, last + 1):
            epoch = self.epoch(number)
            for lane, offset in enumerate(offsets):
                start = lane * self.rows_per_lane
                end = start + min(max(offset - number * self.rows_per_lane, 0), self.rows_per_lane)
                if end > start:
                    total += epoch.rows_before(end, chosen) - epoch.rows_before(start, chosen)
        return total

    def _drawn_in_epochs(self, count: int, chosen: frozenset[int]) -> int:
        """Rows of the chosen shards in the first `count` epochs; they differ by what each epoch drops."""
        sums = self._sums.setdefault(chosen, [0])
        for number in range(len(sums) - 1, count):
            sums.append(sums[-1] + self.epoch(number).rows_before(self.rows_per_lane * self.lanes, chosen))
        return sums[count]
