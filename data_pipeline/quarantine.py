"""The shards that a run goes on without, recorded in its folder so that a replay goes on without them too."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_pipeline.errors import BadShardError, ShardError
from data_pipeline.files import read_description, replace_file
from data_pipeline.ordering import Quarantine

QUARANTINE = "quarantine.json"
_FORMAT = 1


@dataclass(frozen=True)
class LeftOut:
    """A shard by name: rows of the run from `from_row` on that fall in it are left empty; `reason` is for people."""

    name: str
    from_row: int
    reason: str


@dataclass(frozen=True)
class QuarantineRecord:
    """The shards that a run goes on without, and the manifest that names them."""

    manifest_hash: str
    shards: tuple[LeftOut, ...] = ()

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
            return cls(manifest_hash, tuple(LeftOut(**shard) for shard in content["shards"]))
        except TypeError as error:
            raise ShardError(f"{path}: not a record of shards ({error}); {remedy}") from None

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

    def in_order(self, names: Iterable[str]) -> tuple[Quarantine, ...]:
        """The record for an order of shards with these names.

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
        """First empty row by shard, of the shards that concern the first `rows` rows of the run."""
        return {shard.name: shard.from_row for shard in self.shards if shard.from_row < rows}
