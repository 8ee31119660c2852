"""The resumable stream that feeds training: packed rows as torch tensors, step after step.

B rows, T token slots, C char slots. The whole state is the number of rows consumed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_pipeline.errors import ShardError, UserError
from data_pipeline.layout import IGNORED, NO_DOCUMENT, Slots, padding, stack
from data_pipeline.ordering import Order, RowAddress, rows_of_rank
from data_pipeline.rows import RowReader


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-batch: `tokens` (B, T), `chars` (B, C), `labels` (B, C), as int64 tensors."""

    tokens: Slots
    chars: Slots
    labels: torch.Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on another device."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory, for the data loader."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Any) -> "Batch":
        return Batch(self.tokens.map(function), self.chars.map(function), function(self.labels))

    def label_count(self) -> int:
        """Number of supervised labels."""
        return int((self.labels != IGNORED).sum())

    def byte_count(self) -> int:
        """Number of supervised bytes: labels without end marks."""
        return int(((self.labels >= 0) & (self.labels < 256)).sum())

    def token_count(self) -> int:
        """Number of token slots that are no padding."""
        return int((self.tokens.document != NO_DOCUMENT).sum())


def batch_of_rows(rows: list[tuple[Slots, Slots, np.ndarray]]) -> Batch:
    """Stack laid-out rows of equal shape."""
    tokens, chars, labels = zip(*rows, strict=True)
    return Batch(to_torch(stack(tokens)), to_torch(stack(chars)), torch.from_numpy(np.stack(labels)))


def to_torch(slots: Slots) -> Slots:
    """Slots of numpy arrays as slots of tensors that share their memory."""
    return slots.map(torch.from_numpy)


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


class StepDataset(IterableDataset):
    """The micro-batches of one rank, a list for each step, from `first_step` on, without end."""

    def __init__(self, reader: RowReader, order: Order, share: Share, first_step: int):
        share.check(order.lanes)
        if order.rows_per_lane == 0:
            raise ShardError(
                f"the training split has {sum(order.shard_rows)} rows, fewer than data.lanes={order.lanes}; "
                "use fewer lanes, shorter rows or more text"
            )
        self._reader, self._order, self._share, self._first = reader, order, share, first_step

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of one step."""
        share = self._share
        rows = [
            self._reader.row(self._order.locate(g), g)
            for g in rows_of_rank(step, share.rows_per_step, share.rank, share.world)
        ]
        size = len(rows) // share.micro_batches
        return [batch_of_rows(rows[i : i + size]) for i in range(0, len(rows), size)]

    def __iter__(self) -> Iterator[list[Batch] | UserError]:
        worker = get_worker_info()
        # The loader takes turns between its workers: worker w of W makes steps w, w + W, ...
        step, stride = (self._first + worker.id, worker.num_workers) if worker else (self._first, 1)
        while True:
            try:
                yield self.step(step)
            except UserError as error:
                # Raised in a worker it would reach the user wrapped in a traceback: `load_steps` raises it.
                yield error
            step += stride


def load_steps(dataset: StepDataset, workers: int, pin_memory: bool) -> Iterator[list[Batch]]:
    """The steps of a dataset, in an order that does not depend on the number of loader processes.

    Raises:
        ShardError: a shard is missing or torn.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )
    for batches in loader:
        if isinstance(batches, UserError):
            raise batches
        yield batches


def fixed_batches(reader: RowReader, max_rows: int, rows_per_batch: int, share: tuple[int, int]) -> list[Batch]:
    """The first rows of a split, in stored order, dealt evenly to ranks, as this rank's batches.

    Every rank gets equally many batches of equal shape, filled up with rows of padding, so that ranks stay in step.

    Args:
        share: (rank, world).
    """
    rank, world = share
    stored = (RowAddress(0, s, r) for s, rows in enumerate(reader.shard_rows) for r in range(rows))
    addresses = list(islice(stored, max_rows))
    rows = [reader.row(address, None) for address in addresses[rank::world]]
    if not addresses:
        return []
    shape = reader.row(addresses[0], None)
    empty = (padding("token", len(shape[0].ids)), padding("char", len(shape[1].ids)), np.full_like(shape[2], IGNORED))
    per_rank = -(-len(addresses) // world)
    size = min(rows_per_batch, per_rank)
    rows += [empty] * (-(-per_rank // size) * size - len(rows))
    return [batch_of_rows(rows[i : i + size]) for i in range(0, len(rows), size)]
