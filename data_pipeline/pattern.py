"""Which of several sources each turn of each lane takes. Standard library only.

The sources share a circle of `period` points, each as many as its weight. A lane steps round it by a stride near the
golden section, so that every source is spread evenly over the lane's turns; the lanes start at equal distances, so that
every turn holds each source's share of the lanes, rounded up or down.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from math import gcd

_SEARCHED = 64  # steps on either side of the golden section


class Pattern:
    """Sources by turn and lane, with exact shares: of any `period` turns of a lane, each source has its weight.

    Args:
        weights: (source, whole number) of each source. lanes: number of lanes L.
    """

    def __init__(self, weights: Sequence[tuple[str, int]], lanes: int):
        self._weights = dict(sorted(weights))
        self.period, self._lanes = sum(self._weights.values()), lanes
        stride = _stride(self.period)
        self._turns_per_point = pow(stride, -1, self.period)
        names, ends = list(self._weights), list(accumulate(self._weights.values()))
        self._sources = [names[bisect_right(ends, turn * stride % self.period)] for turn in range(self.period)]
        self._turns: dict[str, list[int]] = {name: [] for name in names}
        for turn, name in enumerate(self._sources):
            self._turns[name].append(turn)

    def source(self, lane: int, turn: int) -> str:
        """The source that `lane` takes in `turn`."""
        return self._sources[(self._start(lane) + turn) % self.period]

    def count(self, source: str, lane: int, turns: int) -> int:
        """How many of the first `turns` turns of `lane` take `source`."""
        if source not in self._weights:
            return 0
        start = self._start(lane)
        return self._before(source, start + turns) - self._before(source, start)

    def _start(self, lane: int) -> int:
        """The turn of the common sequence at which a lane begins."""
        return lane * self.period // self._lanes * self._turns_per_point % self.period

    def _before(self, source: str, turn: int) -> int:
        periods, rest = divmod(turn, self.period)
        return periods * self._weights[source] + bisect_left(self._turns[source], rest)


def _stride(period: int) -> int:
    """A step that visits all points of a circle, near the golden section of it."""
    golden = period * 618_034 // 1_000_000
    near = range(max(golden - _SEARCHED, 0), golden + _SEARCHED + 1)
    steps = [step for step in near if gcd(step, period) == 1]
    return min(steps, key=lambda step: (_unevenness(step, period), abs(step - golden)))


def _unevenness(step: int, period: int) -> int:
    """The largest partial quotient of step / period: steps of small ones leave no arc of the circle out for long."""
    largest = 0
    while period:
        largest = max(largest, step // period)
        step, period = period, step % period
    return largest
