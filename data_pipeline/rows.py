"""Row plans on disk, and rows read by them: a row's documents, and its two streams."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import ShardError
from data_pipeline.files import replace_file, sha256_of, whole_file
from data_pipeline.layout import CharPositions, Piece, Slots, lay_out, pack
from data_pipeline.ordering import Order, RowAddress, row_random
from data_pipeline.packing import RowPlan, plan_rows
from data_pipeline.shard_reader import ShardReader
from data_pipeline.shards import Manifest, check_file
from data_pipeline.tokenizer import MixedTokenizer


@dataclass(frozen=True)
class RowFormat:
    """How a row is laid out: its slots, the char positions, and the largest random shift of places."""

    row_tokens: int
    row_chars: int
    char_positions: CharPositions = "mirrored"
    place_shift: int = 0


def plan_folder(manifest: Manifest, row_tokens: int, row_chars: int) -> Path:
    """Where the row plan for these slots is stored."""
    return manifest.folder / f"rows-{row_tokens}x{row_chars}"


def write_row_plan(manifest: Manifest, row_tokens: int, row_chars: int) -> None:
    """Plan the rows of every shard and store the plan beside the shards; `plan.json` is written last.

    Raises:
        ShardError: a block does not fit in a row.
    """
    folder = plan_folder(manifest, row_tokens, row_chars)
    shards: dict[str, list[dict[str, Any]]] = {}
    for split in manifest.content["splits"]:
        shards[split] = []
        for shard in manifest.shards(split):
            plan = plan_rows(manifest.lengths(shard), row_tokens, row_chars, shard["name"])
            path = folder / f"{shard['name']}.npz"
            with whole_file(path) as file:
                np.savez_compressed(file, allow_pickle=False, **vars(plan))
            shards[split].append({"rows": plan.rows, "sha256": sha256_of(path)})
    content = {"manifest": manifest.hash, "row_tokens": row_tokens, "row_chars": row_chars, "shards": shards}
    replace_file(folder / "plan.json", json.dumps(content).encode())


def planned_rows(manifest: Manifest, row_tokens: int, row_chars: int) -> dict[str, list[int]]:
    """Rows of every shard by split, from the stored plan.

    Raises:
        ShardError: there is no plan for these slots, or it belongs to other shards.
    """
    content = _plan_content(manifest, row_tokens, row_chars)
    return {split: [shard["rows"] for shard in shards] for split, shards in content.items()}


def _plan_content(manifest: Manifest, row_tokens: int, row_chars: int) -> dict[str, list[dict[str, Any]]]:
    """By split, rows and sha256 of every shard's plan."""
    path = plan_folder(manifest, row_tokens, row_chars) / "plan.json"
    try:
        content = json.loads(path.read_bytes())
        if content["manifest"] != manifest.hash:
            raise ShardError(f"{path}: the row plan belongs to other shards; remove {path.parent} and plan again")
        return content["shards"]
    except FileNotFoundError:
        raise ShardError(f"{path}: no row plan for {row_tokens}x{row_chars} slots; run `tidal plan-rows`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path}: not a row plan ({error!r}); remove {path.parent} and plan again") from None


class RowReader:
    """Reads rows of one split: addresses in, streams out. Keeps the last few shards open."""

    def __init__(self, manifest: Manifest, split: str, tokenizer: MixedTokenizer, row_format: RowFormat, seed: int):
        self._manifest, self._split, self._format, self._seed = manifest, split, row_format, seed
        self._byte_lengths = tokenizer.byte_lengths
        self._plan = _plan_content(manifest, row_format.row_tokens, row_format.row_chars)[split]
        self.shard_rows = tuple(shard["rows"] for shard in self._plan)
        self._open: Callable[[int], tuple[ShardReader, RowPlan]] = lru_cache(maxsize=16)(self._open_shard)

    def _open_shard(self, shard: int) -> tuple[ShardReader, RowPlan]:
        entry = self._manifest.shards(self._split)[shard]
        path = plan_folder(self._manifest, self._format.row_tokens, self._format.row_chars) / f"{entry['name']}.npz"
        check_file(path, sha256=self._plan[shard]["sha256"])
        with np.load(path, allow_pickle=False) as arrays:
            plan = RowPlan(**arrays)
        return ShardReader(self._manifest.folder, entry), plan

    def pieces(self, address: RowAddress) -> list[Piece]:
        """The pieces of documents that a row holds."""
        reader, plan = self._open(address.shard)
        return [reader.piece(*piece) for piece in plan.pieces(address.row)]

    def documents(self, address: RowAddress) -> list[tuple[str, int]]:
        """Of each piece of a row: where its document stands and comes from, and its first block there."""
        reader, plan = self._open(address.shard)
        shard = self._manifest.shards(self._split)[address.shard]["name"]
        found = []
        for number, first, _ in plan.pieces(address.row):
            file, line = reader.document(number)[1]
            found.append((f"{shard} document {number} ({file}:{line})", first))
        return found

    def row(self, address: RowAddress, g: int | None) -> tuple[Slots, Slots, np.ndarray]:
        """One row's tokens (T,), chars (C,) and labels (C,); `g` seeds the shift of places, None means no shift."""
        rng = row_random(self._seed, g) if g is not None and self._format.place_shift else None
        laid_out = [
            lay_out(
                piece,
                self._byte_lengths,
                self._format.char_positions,
                rng.randint(0, self._format.place_shift) if rng else 0,
            )
            for piece in self.pieces(address)
        ]
        return pack(laid_out, self._format.row_tokens, self._format.row_chars)


def roll(rolling_hash: str, order: Order, rows: range) -> str:
    """The rolling hash after consuming `rows` one by one; before the first row it is the manifest's hash."""
    for g in rows:
        address = order.locate(g)
        rolling_hash = hashlib.sha256(f"{rolling_hash} {address.shard} {address.row}".encode()).hexdigest()
    return rolling_hash
