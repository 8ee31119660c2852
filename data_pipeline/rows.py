"""Row plans on disk, and rows read by them: a row's documents, and its two streams."""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.baselines import CharOrder, Writes, lay_out_forward_rows, lay_out_plain_rows, plain_shape
from data_pipeline.errors import BadShardError, ShardError
from data_pipeline.files import write_npz
from data_pipeline.layout import CharPositions, LaidOut, lay_out_rows
from data_pipeline.ordering import RowAddress, row_random
from data_pipeline.packing import DocumentLengths, RowPlan, plan_rows
from data_pipeline.pieces import Piece
from data_pipeline.shard_reader import ShardReader
from data_pipeline.shards import DataConfig, Manifest
from data_pipeline.storage import Storage
from data_pipeline.tokenizer import MixedTokenizer

PLAN = "plan.json"


@dataclass(frozen=True)
class RowFormat:
    """How a row is laid out: its slots, the char positions, the largest random shift of places, the overlap of
    the pieces of long documents in tokens; of baselines (`data_pipeline.baselines`) what is written, in which order.
    """

    row_tokens: int
    row_chars: int
    char_positions: CharPositions = "mirrored"
    place_shift: int = 0
    overlap_tokens: int = 0
    writes: Writes = "blocks"
    char_order: CharOrder = "reversed"

    @property
    def plan_name(self) -> str:
        """The folder, beside the shards, of the row plan for these slots."""
        overlap = f"-overlap-{self.overlap_tokens}" if self.overlap_tokens else ""
        return f"rows-{self.row_tokens}x{self.row_chars}{overlap}"


def row_format_of(
    data: DataConfig,
    char_positions: CharPositions = "mirrored",
    place_shift: int = 0,
    writes: Writes = "blocks",
    char_order: CharOrder = "reversed",
) -> RowFormat:
    """The rows that a configuration asks for."""
    slots = data.row_tokens, data.row_chars
    return RowFormat(*slots, char_positions, place_shift, data.overlap_tokens, writes, char_order)


def lay_out_as(
    row_format: RowFormat,
    rows: Sequence[Sequence[Piece]],
    shifts: Sequence[Sequence[int]],
    byte_lengths: np.ndarray,
    shape: tuple[int, int],
) -> LaidOut:
    """Rows of pieces as the format wants them, in `shape` slots; arguments and result as of `lay_out_rows`."""
    if row_format.writes != "blocks":
        return lay_out_plain_rows(rows, row_format.writes, shape)
    if row_format.char_order == "forward":
        return lay_out_forward_rows(rows, shifts, byte_lengths, row_format.char_positions, shape)
    return lay_out_rows(rows, shifts, byte_lengths, row_format.char_positions, shape)


def plan_shard(storage: Storage, name: str, lengths: DocumentLengths, row_format: RowFormat) -> dict[str, Any]:
    """Plan the rows of one shard and store the plan; its entry in `plan.json`.

    Raises:
        ShardError: a block does not fit in a row.
    """
    plan = plan_rows(lengths, row_format.row_tokens, row_format.row_chars, name, row_format.overlap_tokens)
    file = io.BytesIO()
    write_npz(file, vars(plan))
    data = file.getvalue()
    storage.write(f"{row_format.plan_name}/{name}.npz", data)
    return {
        "name": name,
        "rows": plan.rows,
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "token_slots": int(plan.token_slots.sum(dtype=np.int64)),
        "char_slots": int(plan.char_slots.sum(dtype=np.int64)),
    }


def write_row_plan(
    manifest: Manifest, row_format: RowFormat, planned: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """Plan the rows of every shard and store the plan beside the shards; `plan.json` is written last.

    Args:
        planned: entries, by shard, of plans that are stored already (`plan_shard`).

    Raises:
        ShardError: a block does not fit in a row.
    """
    planned = planned or {}
    shards = {
        split: [
            planned.get(shard["name"])
            or plan_shard(manifest.storage, shard["name"], manifest.lengths(shard), row_format)
            for shard in manifest.shards(split)
        ]
        for split in manifest.content["splits"]
    }
    content = {
        "manifest": manifest.hash,
        "row_tokens": row_format.row_tokens,
        "row_chars": row_format.row_chars,
        "overlap_tokens": row_format.overlap_tokens,
        "shards": shards,
    }
    manifest.storage.write(f"{row_format.plan_name}/{PLAN}", json.dumps(content).encode())


def has_row_plan(manifest: Manifest, row_format: RowFormat) -> bool:
    """Whether there is a plan for these slots."""
    return manifest.storage.exists(f"{row_format.plan_name}/{PLAN}")


def read_row_plan(manifest: Manifest, row_format: RowFormat) -> dict[str, list[dict[str, Any]]]:
    """By split, the entry of every shard's plan: rows, size, sha256, slots that are filled.

    Raises:
        ShardError: there is no plan for these slots, or it belongs to other shards.
    """
    name = f"{row_format.plan_name}/{PLAN}"
    where = manifest.storage.describe(name)
    folder = where.removesuffix(f"/{PLAN}")
    try:
        content = json.loads(manifest.storage.read(name))
        if content["manifest"] != manifest.hash:
            raise ShardError(f"{where}: the row plan belongs to other shards; remove {folder} and plan again")
        return content["shards"]
    except (FileNotFoundError, NotADirectoryError):
        slots = f"{row_format.row_tokens}x{row_format.row_chars}"
        raise ShardError(f"{where}: no row plan for {slots} slots; run `tidal plan-rows`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{where}: not a row plan ({error!r}); remove {folder} and plan again") from None


class PieceOrigin(NamedTuple):
    """Where a piece of a row comes from.

    Attributes:
        document: number in its shard. file, line: that it comes from; line or record from 1, 0 for a whole file.
        first_block, end_block: the piece's blocks in the document. first_byte: bytes of the document before them.
    """

    document: int
    file: str
    line: int
    first_block: int
    end_block: int
    first_byte: int


class RowReader:
    """Reads rows of one split: addresses in, streams out. Keeps the last shards open, `open_shards` at most.

    Attributes:
        shape: token slots T and char slots C of a row.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        tokenizer: MixedTokenizer,
        row_format: RowFormat,
        seed: int,
        open_shards: int = 64,
    ):
        self._manifest, self._split, self._format, self._seed = manifest, split, row_format, seed
        self._byte_lengths = tokenizer.byte_lengths.astype(np.int32)
        self._plan = read_row_plan(manifest, row_format)[split]
        self.shard_rows = tuple(shard["rows"] for shard in self._plan)
        self._open: Callable[[int], tuple[ShardReader, RowPlan]] = lru_cache(open_shards)(self._open_shard)
        self.shape = (row_format.row_tokens, row_format.row_chars)
        if row_format.writes != "blocks":
            self.shape = plain_shape([self._row_plan(shard) for shard in range(len(self._plan))], row_format.writes)

    def _open_shard(self, shard: int) -> tuple[ShardReader, RowPlan]:
        reader = ShardReader(self._manifest.storage, self._manifest.shards(self._split)[shard])
        return reader, self._row_plan(shard)

    def _row_plan(self, shard: int) -> RowPlan:
        plan = self._plan[shard]
        name = f"{self._format.plan_name}/{plan['name']}.npz"
        opened = self._manifest.storage.open(name, plan["size"], plan["sha256"])
        with opened as file, np.load(file, allow_pickle=False) as arrays:
            return RowPlan(**arrays)

    def pieces(self, address: RowAddress) -> list[Piece]:
        """The pieces of documents that a row holds.

        Raises:
            BadShardError: the row's shard is missing, torn or not what was written.
        """
        try:
            reader, plan = self._open(address.shard)
            return [reader.read(piece) for piece in plan.addresses(address.row)]
        except ShardError as error:
            name = self._manifest.shards(self._split)[address.shard]["name"]
            raise BadShardError(str(error), address.shard, name) from None

    def documents(self, address: RowAddress) -> list[tuple[str, int]]:
        """Of each piece of a row: where its document stands and comes from, and its first block there."""
        shard = self._manifest.shards(self._split)[address.shard]["name"]
        origins = self.origins(address)
        return [(f"{shard} document {o.document} ({o.file}:{o.line})", o.first_block) for o in origins]

    def origins(self, address: RowAddress) -> list[PieceOrigin]:
        """Where each piece of a row comes from.

        Raises:
            ShardError: the row's shard is missing, torn or not what was written.
        """
        reader, plan = self._open(address.shard)
        found = []
        for document, first, end in plan.pieces(address.row):
            before = len(reader.piece(document, 0, first).chars) if first else 0
            found.append(PieceOrigin(document, *reader.origin(document), first, end, before))
        return found

    def rows(self, wanted: Sequence[tuple[RowAddress | None, int | None]]) -> LaidOut:
        """B rows at once: tokens (B, T), chars (B, C) and labels (B, C), all int32.

        Args:
            wanted: the address of each row, None for a row without documents; and its number g in the run, which
                seeds the shift of places, None for no shift.

        Raises:
            BadShardError: a row's shard is missing, torn or not what was written.
        """
        rows = [self.pieces(address) if address is not None else [] for address, _ in wanted]
        shifts = [self._shifts(len(row), g) for row, (_, g) in zip(rows, wanted, strict=True)]
        return lay_out_as(self._format, rows, shifts, self._byte_lengths, self.shape)

    def row(self, address: RowAddress | None, g: int | None) -> LaidOut:
        """One row's tokens (T,), chars (C,) and labels (C,), as in `rows`."""
        tokens, chars, labels = self.rows([(address, g)])
        return tokens.at(0), chars.at(0), labels[0]

    def _shifts(self, pieces: int, g: int | None) -> list[int]:
        if g is None or not self._format.place_shift:
            return [0] * pieces
        rng = row_random(self._seed, g)
        return [rng.randint(0, self._format.place_shift) for _ in range(pieces)]
