"""The resumable stream that feeds training: packed rows as torch tensors, step after step.

B rows, T token slots, C char slots. The whole state is the number of rows consumed.
"""

import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_pipeline.errors import ShardError, UserError
from data_pipeline.layout import IGNORED, NO_DOCUMENT, LaidOut, Slots, stack
from data_pipeline.ordering import EmptyRows, Order, Quarantine, RowAddress, Share, identity_sum, rows_of_rank
from data_pipeline.rows import RowReader


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-batch: `tokens` (B, T), `chars` (B, C), `labels` (B, C).

    The loader makes int32 tensors, half as much to move; `to` makes them int64, as PyTorch's indexing wants them.
    """

    tokens: Slots
    chars: Slots
    labels: torch.Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device, as int64."""
        return self._map(lambda t: t.to(device, non_blocking=True).long())

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory, for the data loader."""
        return self._map(torch.Tensor.pin_memory)

    def tensors(self) -> list[torch.Tensor]:
        """All tensors: those of the token slots, of the char slots, and the labels."""
        return [*self.tokens.arrays().values(), *self.chars.arrays().values(), self.labels]

    def _map(self, function: Any) -> "Batch":
        return Batch(self.tokens.map(function), self.chars.map(function), function(self.labels))

    def label_count(self) -> int:
        """Number of supervised labels."""
        return int((self.labels != IGNORED).sum())

    def byte_count(self, byte_lengths: np.ndarray | None = None) -> int:
        """Number of supervised bytes: labels without end marks.

        Args:
            byte_lengths: bytes that each id stands for, where labels may be BPE tokens.
        """
        if byte_lengths is None:
            return int(((self.labels >= 0) & (self.labels < 256)).sum())
        return int(byte_lengths.take(self.labels[self.labels != IGNORED].cpu().numpy()).sum())

    def token_count(self) -> int:
        """Number of token slots that are no padding."""
        return int((self.tokens.document != NO_DOCUMENT).sum())


def batch_of_rows(rows: list[tuple[Slots, Slots, np.ndarray]]) -> Batch:
    """Stack laid-out rows of equal shape, as int64."""
    tokens, chars, labels = zip(*rows, strict=True)
    return batch_of((stack(tokens), stack(chars), np.stack(labels))).to("cpu")


def batch_of(rows: LaidOut) -> Batch:
    """A batch of rows that are stacked already, which shares their memory."""
    tokens, chars, labels = rows
    return Batch(to_torch(tokens), to_torch(chars), torch.from_numpy(labels))


def to_torch(slots: Slots) -> Slots:
    """Slots of numpy arrays as slots of tensors that share their memory."""
    return slots.map(torch.from_numpy)


class Step(NamedTuple):
    """One step of one rank: its micro-batches, and on rank 0 what the rows of all ranks add to the rolling hash."""

    batches: list[Batch]
    identity_sum: int

    def pin_memory(self) -> "Step":
        """The step in pinned memory."""
        return self._replace(batches=[batch.pin_memory() for batch in self.batches])


class StepDataset(IterableDataset):
    """The steps of one rank, from `first_step` on, without end. Order and share must fit (`check`)."""

    def __init__(self, reader: RowReader, order: Order, share: Share, first_step: int):
        self._reader, self._order, self._share, self._first = reader, order, share, first_step

    def step(self, step: int) -> Step:
        """One step.

        Raises:
            BadShardError: a shard of it is missing, torn or not what was written.
        """
        share = self._share
        rows = rows_of_rank(step, share.rows_per_step, share.rank, share.world)
        every_row = range(step * share.rows_per_step, (step + 1) * share.rows_per_step)
        located = {g: self._order.locate(g) for g in (every_row if share.rank == 0 else rows)}
        wanted = [(None if located[g].quarantined else located[g], g) for g in rows]
        return Step(self._micro_batches(wanted), identity_sum(located) if share.rank == 0 else 0)

    def empty_step(self) -> Step:
        """A step of empty rows, which has the shape of every step."""
        return Step(self._micro_batches([(None, None)] * (self._share.rows_per_step // self._share.world)), 0)

    def _micro_batches(self, wanted: Sequence[tuple[RowAddress | None, int | None]]) -> list[Batch]:
        size = len(wanted) // self._share.micro_batches
        return [batch_of(self._reader.rows(wanted[i : i + size])) for i in range(0, len(wanted), size)]

    def __iter__(self) -> Iterator[Step | UserError]:
        worker = get_worker_info()
        # The loader takes turns between its workers: worker w of W makes steps w, w + W, ...
        step, stride = (self._first + worker.id, worker.num_workers) if worker else (self._first, 1)
        while True:
            try:
                yield self.step(step)
            except UserError as error:
                # Raised in a worker it would reach the user wrapped in a traceback: `Stream` raises it.
                yield error
            step += stride


@dataclass(frozen=True)
class Loading:
    """How steps are loaded: by `workers` processes, each `prefetch_steps` ahead, into pinned memory or not."""

    workers: int = 0
    prefetch_steps: int = 4
    pin_memory: bool = False


class Stream:
    """The steps of one rank, in an order that does not depend on how they are loaded. Its state is the rows consumed.

    Args:
        reader: of the training split. order: of its rows. share: what this rank reads of them.
        manifest_hash: of the shards, so that a state is not loaded over others.

    Raises:
        ShardError: lanes, ranks, batch, mix and shards do not fit; while iterating, a `BadShardError`.
    """

    def __init__(
        self, reader: RowReader, order: Order, share: Share, manifest_hash: str, loading: Loading | None = None
    ):
        self._reader, self._share, self._manifest_hash = reader, share, manifest_hash
        self._loading = loading or Loading()
        self.order, self.rows = order, 0
        self._steps: Iterator[Step | UserError] | None = None
        share.check(order.lanes)
        order.check()

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Step:
        if self._steps is None:
            first_step = self.rows // self._share.rows_per_step
            self._steps = _load_steps(StepDataset(self._reader, self.order, self._share, first_step), self._loading)
        item = next(self._steps)
        if isinstance(item, UserError):
            self._steps = None  # so that whoever goes on gets the same step again
            raise item
        self.rows += self._share.rows_per_step
        return item

    def state_dict(self) -> dict[str, Any]:
        """The rows consumed by all ranks, the shards' manifest, and the shards and rows that are left out."""
        quarantine = {str(q.shard): q.from_row for q in self.order.quarantines}
        empty = [[rows.from_row, rows.to_row] for rows in self.order.empty_rows]
        left_out = {"quarantine": quarantine, "empty_rows": empty}
        return {"rows": self.rows, "manifest_hash": self._manifest_hash} | left_out

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another stream of these shards stood, of any number of ranks and workers: seeks, never replays.

        Raises:
            ShardError: the state belongs to other shards, or is not the end of a step.
        """
        if state["manifest_hash"] != self._manifest_hash:
            raise ShardError(
                f"the stream's state is of other shards (manifest {state['manifest_hash'][:12]}, "
                f"not {self._manifest_hash[:12]}); resume with those"
            )
        if state["rows"] % self._share.rows_per_step:
            raise ShardError(
                f"the stream's state is after {state['rows']} rows, no whole number of steps of "
                f"training.batch_rows={self._share.rows_per_step}; resume with another batch"
            )
        self.rows = state["rows"]
        quarantines = [Quarantine(int(shard), from_row) for shard, from_row in state["quarantine"].items()]
        self.leave_out(quarantines, [EmptyRows(*rows) for rows in state.get("empty_rows", [])])

    def leave_out(self, quarantines: Iterable[Quarantine], empty_rows: Iterable[EmptyRows] = ()) -> None:
        """Read the next step, and all after it, with these shards and rows left out and no others."""
        self.order = replace(self.order, quarantines=tuple(quarantines), empty_rows=tuple(empty_rows))
        self._steps = None

    def was_empty(self, empty_rows: Iterable[EmptyRows]) -> None:
        """Have the order leave these rows out, of which all that are new to it are consumed: steps that are loaded
        ahead stay as they are."""
        self.order = replace(self.order, empty_rows=tuple(empty_rows))


def _load_steps(dataset: StepDataset, loading: Loading) -> Iterator[Step | UserError]:
    """The steps of a dataset, and errors in the place of those that cannot be read."""
    # No method of `Stream`: a stream that is dropped must end its processes then, not when cycles are collected.
    if not loading.workers:
        for item in dataset:
            yield item.pin_memory() if loading.pin_memory and isinstance(item, Step) else item
        return
    ring = _Ring(dataset.empty_step(), loading)
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=loading.workers,
        collate_fn=ring.put,
        prefetch_factor=loading.prefetch_steps,
        multiprocessing_context="fork",  # the ring is memory that is shared with children alone
    )
    for item in loader:
        yield ring.take(item) if isinstance(item, _Ring.Place) else item


class _Ring:
    """Memory in which loader processes leave their steps, used over and over.

    Sent as tensors, a step of 15 arrays would take a file, its pages and a mapping for each, which costs more than
    laying out its rows, and room in /dev/shm, of which containers have little.
    """

    class Place(NamedTuple):
        """Where a step lies, and what it adds to the rolling hash."""

        worker: int
        turn: int
        identity_sum: int

    def __init__(self, shape: Step, loading: Loading):
        """Room for steps of the shape of `shape`."""
        self._micro_batches, self._pin_memory = len(shape.batches), loading.pin_memory
        self._tokens, self._chars = shape.batches[0].tokens.ids.shape, shape.batches[0].labels.shape
        size = sum(tensor.numel() for batch in shape.batches for tensor in batch.tensors())
        # While the step that was sent first is copied out, a worker may be `prefetch_steps` steps further.
        turns = loading.prefetch_steps + 1
        memory = torch.frombuffer(mmap.mmap(-1, 4 * loading.workers * turns * size), dtype=torch.int32)
        self._memory = memory.view(loading.workers, turns, size)
        self._steps_made = 0

    def put(self, item: Any) -> "_Ring.Place | UserError":
        """In a loader process: leave its next step; an error is sent as it is."""
        if isinstance(item, UserError):
            return item
        info = get_worker_info()
        assert info is not None
        turn = self._steps_made % self._memory.shape[1]
        self._steps_made += 1
        arrays = [tensor.view(-1) for batch in item.batches for tensor in batch.tensors()]
        torch.cat(arrays, out=self._memory[info.id, turn])
        return self.Place(info.id, turn, item.identity_sum)

    def take(self, place: "_Ring.Place") -> Step:
        """In the training process: a copy of a step."""
        left = self._memory[place.worker, place.turn]
        data = torch.empty(left.shape, dtype=left.dtype, pin_memory=self._pin_memory).copy_(left)
        n = len(fields(Slots)) - 1  # arrays of a stream
        sizes = [n * self._tokens.numel(), (n + 1) * self._chars.numel()]
        parts = iter(data.split(sizes * self._micro_batches))
        batches = []
        for tokens, chars in zip(parts, parts, strict=True):
            *char_arrays, labels = chars.view(n + 1, *self._chars)
            batches.append(Batch(Slots("token", *tokens.view(n, *self._tokens)), Slots("char", *char_arrays), labels))
        return Step(batches, place.identity_sum)


def fixed_batches(reader: RowReader, max_rows: int, rows_per_batch: int, share: tuple[int, int]) -> list[Batch]:
    """The first rows of a split, in stored order, dealt evenly to ranks, as this rank's batches.

    Every rank gets equally many batches of equal shape, filled up with rows of padding, so that ranks stay in step.

    Args:
        share: (rank, world).
    """
    rank, world = share
    stored = (RowAddress(0, s, r) for s, rows in enumerate(reader.shard_rows) for r in range(rows))
    addresses = list(islice(stored, max_rows))
    if not addresses:
        return []
    per_rank = -(-len(addresses) // world)
    size = min(rows_per_batch, per_rank)
    own: list[RowAddress | None] = list(addresses[rank::world])
    own += [None] * (-(-per_rank // size) * size - len(own))
    batches = (own[i : i + size] for i in range(0, len(own), size))
    return [batch_of(reader.rows([(address, None) for address in batch])) for batch in batches]
