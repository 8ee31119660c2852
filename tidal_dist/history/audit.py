"""Did two runs see the same rows, and if not, from which step on."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.ordering import RowAddress, roll
from data_pipeline.run_order import SPLIT
from tidal_dist.config import Config
from tidal_dist.errors import ShardError, UserError
from tidal_dist.history.log import ROLLING_HASH, Line, read_log
from tidal_dist.history.past import PastRun, open_run, run_config

# What the order of the rows depends on, beside the shards and the record of those left out.
_SETTINGS = ("seed", "lanes", "mix", "row_tokens", "row_chars", "overlap_tokens")


@dataclass(frozen=True)
class _Side:
    """One of the two runs: its log, and itself if what it read can be computed again, else why not."""

    folder: Path
    config: Config
    log: list[Line]
    run: PastRun | None
    why_not: str

    @property
    def rows(self) -> int:
        """Rows that the log covers."""
        return self.log[-1].rows

    def step_of(self, g: int) -> int:
        """The step that consumed a row, counted from 1."""
        return g // self.config.training.batch_rows + 1

    def hash_at(self, rows: int) -> str:
        """The rolling hash after `rows` rows: the log's nearest line before, rolled on."""
        line = self.log[bisect_right(self.log, rows, key=lambda line: line.rows) - 1]
        if line.rows == rows:
            return line.rolling_hash
        assert self.run is not None
        return roll(line.rolling_hash, self.run.order, range(line.rows, rows))


def audit(first: Path, second: Path) -> dict[str, Any]:
    """Compare what two runs read, by their rolling hashes; runs of different batches are compared row by row.

    Raises:
        UserError: one of the folders is no run or has no rolling hashes.
    """
    sides = _side(first), _side(second)
    end = min(side.rows for side in sides)
    last_same, first_other = _bracket(sides, end)
    report: dict[str, Any] = {
        "same": first_other is None,
        "rows_compared": end,
        "runs": [{"run": str(s.folder), "rows": s.rows, "steps": s.log[-1].step, "note": s.why_not} for s in sides],
    }
    if first_other is not None:
        g = _first_difference(sides, last_same, first_other)
        report["same_rows"] = last_same if g is None else g
        report["differs_by_row"] = first_other if g is None else g + 1
        report["first_different_step"] = [s.step_of(report["same_rows"]) for s in sides]
        report["pinned"] = g is not None
        report["settings"] = _settings(sides)
        if g is not None:
            report["held"] = [_held(side, g) for side in sides]
    return report


def as_text(report: dict[str, Any]) -> str:
    """The report of `audit` for a terminal."""
    runs = report["runs"]
    lines = [f"{r['run']}: {r['rows']:,} rows in {r['steps']:,} steps" for r in runs]
    lines += [f"{r['run']}: only its log is compared ({r['note']})" for r in runs if r["note"]]
    if report["same"]:
        return "\n".join([*lines, f"the same rows, {report['rows_compared']:,} of them"])
    steps = " and ".join(f"step {s:,} of {r['run']}" for s, r in zip(report["first_different_step"], runs, strict=True))
    same, by = report["same_rows"], report["differs_by_row"]
    if report["pinned"]:
        lines.append(f"the first {same:,} rows are the same; row {same:,}, in {steps}, differs:")
        lines += [f"  {r['run']}: {held}" for r, held in zip(runs, report["held"], strict=True)]
    else:
        lines.append(f"the first {same:,} rows are the same; others within the first {by:,} differ, from {steps} on")
    for name, values in report["settings"].items():
        lines.append(f"{name}: {values[0]} and {values[1]}")
    if not report["settings"]:
        lines.append("nothing in the folders explains it: one of them was changed after it had run")
    return "\n".join(lines)


def _side(folder: Path) -> _Side:
    config, log = run_config(folder), read_log(folder)
    if not log:
        raise UserError(f"{folder}: no {ROLLING_HASH}, so nothing is known of the rows that it read")
    try:
        return _Side(folder, config, log, open_run(folder), "")
    except ShardError as error:
        return _Side(folder, config, log, None, str(error))


def _bracket(sides: tuple[_Side, _Side], end: int) -> tuple[int, int | None]:
    """The most rows that are known to be the same, and the fewest that are known to differ; None where none do."""
    if all(side.run for side in sides):
        known = sorted({line.rows for side in sides for line in side.log if line.rows <= end})
    else:
        first, second = ({line.rows for line in side.log} for side in sides)
        known = sorted(first & second)

    def differ(rows: int) -> bool:
        return sides[0].hash_at(rows) != sides[1].hash_at(rows)

    # Each hash covers all rows before it: what differs stays different.
    nth = bisect_left(known, True, key=differ)
    if nth == len(known):
        return known[-1] if known else 0, None
    return known[nth - 1] if nth else 0, max(known[nth], 1)


def _first_difference(sides: tuple[_Side, _Side], start: int, end: int) -> int | None:
    """The first row from `start` on that is another in one run than in the other, if both can be computed."""
    first, second = (side.run for side in sides)
    if first is None or second is None:
        return None
    if first.start != second.start:
        return start
    identity: Callable[[RowAddress], tuple] = lambda a: (a.shard, a.row, a.quarantined)  # noqa: E731
    rows = range(start, end)
    return next((g for g in rows if identity(first.order.locate(g)) != identity(second.order.locate(g))), None)


def _held(side: _Side, g: int) -> str:
    assert side.run is not None
    address = side.run.order.locate(g)
    name = side.run.manifest.shards(SPLIT)[address.shard]["name"]
    return f"{name} row {address.row}" + (", left empty" if address.quarantined else "")


def _settings(sides: tuple[_Side, _Side]) -> dict[str, list[Any]]:
    """What the order depends on and is not the same in both runs."""
    values: list[dict[str, Any]] = []
    for side in sides:
        data = side.config.data.model_dump()
        found = {f"data.{name}": data[name] for name in _SETTINGS}
        if data["mix"]:  # stages begin with a step
            found["training.batch_rows"] = side.config.training.batch_rows
        if side.run is not None:
            found["manifest"] = side.run.manifest.hash[:12]
            names = [entry["name"] for entry in side.run.manifest.shards(SPLIT)]
            order = side.run.order
            found["left out"] = {names[q.shard]: q.from_row for q in order.quarantines}
            found["rows left out"] = [[rows.from_row, rows.to_row] for rows in order.empty_rows]
        values.append(found)
    keys = dict.fromkeys([*values[0], *values[1]])
    pairs = {key: [v.get(key) for v in values] for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
