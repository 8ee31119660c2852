"""The shards and rows that a run goes on without, recorded in its folder so that a replay goes on without them too."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_pipeline.errors import BadShardError, ShardError
from data_pipeline.files import read_description, replace_file
from data_pipeline.ordering import EmptyRows, Quarantine

QUARANTINE = "quarantine.json"
_FORMAT = 1


@dataclass(frozen=True)
class LeftOut:
    """A shard by name: rows of the run from `from_row` on that fall in it are left empty; `reason` is for people."""

    name: str
    from_row: int
    reason: str


@dataclass(frozen=True)
class LeftOutRows:
    """Rows `from_row` to `to_row`, which is not one of them, of the run are left empty; `reason` is for people.

    `rollbacks`: how often the run went back to a checkpoint before them; 0 for those of a single bad step.
    """

    from_row: int
    to_row: int
    reason: str
    rollbacks: int = 0


@dataclass(frozen=True)
class QuarantineRecord:
    """The shards and rows that a run goes on without, and the manifest that names the shards.

    `rows`: in the order of the rows, none of them twice.
    """

    manifest_hash: str
    shards: tuple[LeftOut, ...] = ()
    rows: tuple[LeftOutRows, ...] = ()

    @classmethod
    def load(cls, run: Path, manifest_hash: str) -> "QuarantineRecord":
        """The record in a run's folder; an empty one where there is none.

        Raises:
            ShardError: it cannot be read or belongs to other shards.
        """
        path = run / QUARANTINE
        if not path.exists():
            return cls(manifest_hash)
        remedy = "restore it, or remove it to read all shards"
        content, _ = read_description(path, _FORMAT, {"manifest_hash", "shards"}, ShardError, "", remedy)
        if content["manifest_hash"] != manifest_hash:
            raise ShardError(f"{path}: recorded with other shards than the run's; {remedy}")
        try:
            shards = tuple(LeftOut(**shard) for shard in content["shards"])
            return cls(manifest_hash, shards, tuple(LeftOutRows(**rows) for rows in content.get("rows", [])))
        except TypeError as error:
            raise ShardError(f"{path}: not a record of shards and rows ({error}); {remedy}") from None

    def write(self, run: Path) -> None:
        """Store the record in a run's folder, whole or not at all."""
        replace_file(run / QUARANTINE, json.dumps({"format": _FORMAT} | asdict(self), indent=1).encode())

    def with_shards(self, errors: Iterable[BadShardError], from_row: int) -> "QuarantineRecord":
        """The record with shards added that could not be read at `from_row`; an earlier row replaces a later one."""
        shards = {shard.name: shard for shard in self.shards}
        for error in errors:
            if error.name not in shards or from_row < shards[error.name].from_row:
                shards[error.name] = LeftOut(error.name, from_row, str(error))
        return replace(self, shards=tuple(shards[name] for name in sorted(shards)))

    def with_rows(self, new: LeftOutRows) -> "QuarantineRecord":
        """The record with rows added; what was said of them before gives way, but going back is not forgotten."""
        rows, rollbacks = [], new.rollbacks
        for old in self.rows:
            if old.from_row < new.from_row:
                rows.append(replace(old, to_row=min(old.to_row, new.from_row)))
            elif old.from_row >= new.to_row:
                rows.append(old)
            else:
                assert old.to_row <= new.to_row, "rows are left out up to where the run stands"
                rollbacks += old.rollbacks
        rows.append(replace(new, rollbacks=rollbacks))
        return replace(self, rows=tuple(sorted(rows, key=lambda r: r.from_row)))

    @property
    def rollbacks(self) -> int:
        """How often the run went back to a checkpoint."""
        return sum(rows.rollbacks for rows in self.rows)

    def bad_rows_before(self, g: int) -> int:
        """How many rows right before row `g` were left out as those of bad steps, since the run last went back."""
        start = g
        for rows in reversed([rows for rows in self.rows if rows.from_row < g]):
            if rows.to_row < start or rows.rollbacks:
                break
            start = rows.from_row
        return g - start

    def empty_rows(self) -> tuple[EmptyRows, ...]:
        """The rows for an order; stretches that touch are one."""
        merged: list[EmptyRows] = []
        for rows in self.rows:
            if merged and merged[-1].to_row == rows.from_row:
                merged[-1] = EmptyRows(merged[-1].from_row, rows.to_row)
            else:
                merged.append(EmptyRows(rows.from_row, rows.to_row))
        return tuple(merged)

    def why_empty(self, g: int) -> str | None:
        """Why row `g` is left out, whatever its shard; None where it is not."""
        return next((rows.reason for rows in self.rows if rows.from_row <= g < rows.to_row), None)

    def in_order(self, names: Iterable[str]) -> tuple[Quarantine, ...]:
        """The shards of the record for an order of shards with these names.

        Raises:
            ShardError: there is no shard of a recorded name.
        """
        indices = {name: i for i, name in enumerate(names)}
        if missing := [shard.name for shard in self.shards if shard.name not in indices]:
            raise ShardError(
                f"{QUARANTINE}: the training split has no shard {missing[0]}; restore or remove the record"
            )
        return tuple(Quarantine(indices[shard.name], shard.from_row) for shard in self.shards)

    def before(self, rows: int) -> dict[str, int]:
        """What concerns the first `rows` rows of the run: of each shard the first empty row, and under "rows N" the row
        after a stretch of empty ones from row N on."""
        found = {shard.name: shard.from_row for shard in self.shards if shard.from_row < rows}
        empty = (stretch for stretch in self.empty_rows() if stretch.from_row < rows)
        return found | {f"rows {stretch.from_row}": min(stretch.to_row, rows) for stretch in empty}
