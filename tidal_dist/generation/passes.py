"""Passes of the model over a cache: as they come, or on a GPU as recorded graphs.

B sequences of a pass, T token and C char slots of each, V ids of the output vocabulary, F arrays of `Slots`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_pipeline.layout import ARRAYS, CharPositions, Slots, char_slots
from tidal_dist.generation.cache import Cache, side_by_side, slots_of
from tidal_dist.generation.exchange import Feed

Shape = tuple[int, int, int]  # B, T, C
Answering = Callable[[Slots, Slots], torch.Tensor]  # what a pass runs: tokens and chars -> logits (B, C, V)
_FEW_SLOTS = 64  # of a pass: a small model makes it on one thread
_GRAPH_TOKENS = (0, 1, 2, 4, 8, 16)  # T of passes that are recorded; passes with more are run as they come
_GRAPH_CHARS = (1, 4, 8, 16, 32)


@dataclass(frozen=True)
class PassInputs:
    """What a pass takes.

    Attributes:
        rows: the cache's sequences. shape: B, T, C. longest: tokens of the longest sequence after it.
        flat: everything else in one array of int64, for one copy to the device, see `parts`.
    """

    rows: slice
    shape: Shape
    longest: int
    flat: np.ndarray

    @classmethod
    def of_shape(cls, rows: slice, shape: Shape, longest: int) -> "PassInputs":
        """Inputs to be filled in."""
        b, t, c = shape
        return cls(rows, shape, longest, np.zeros(b * (t + c) * (len(ARRAYS) + 1) + 2 * b, np.int64))


def parts(flat: Any, shape: Shape) -> tuple[Any, Any, Any]:
    """Views of `PassInputs.flat`, of an array or a tensor: what `Cache.aim` takes as `new`."""
    b, n = shape[0], shape[1] + shape[2]
    slots_end, targets_end = b * n * len(ARRAYS), b * n * (len(ARRAYS) + 1)
    slots, targets = flat[:slots_end].reshape(b, n, len(ARRAYS)), flat[slots_end:targets_end].reshape(b, n)
    return slots, targets, flat[targets_end:].reshape(2, b)


def fill(slots: np.ndarray, n_tokens: int, feeds: Sequence[Feed], char_positions: CharPositions) -> None:
    """Put what is fed into slots (B, T + C, F) of zeros, which are padding."""
    for row, fed in enumerate(feeds):
        if fed.tokens is not None:
            slots[row, : len(fed.tokens)] = fed.tokens
    where = [(row, n_tokens + i) for row, fed in enumerate(feeds) for i in range(len(fed.chars))]
    if where:
        ids, c, block, start_pos = np.array([char for fed in feeds for char in fed.chars]).T
        slots[tuple(np.array(where).T)] = side_by_side(char_slots(ids, c, block, start_pos, char_positions))


def are_few(feeds: Sequence[Feed]) -> bool:
    """Whether a small model makes a pass over what is fed faster on one thread."""
    return sum(fed.slots for fed in feeds) <= _FEW_SLOTS


class Eager:
    """Runs a pass as it comes."""

    def __init__(self, answering: Answering, cache: Cache, device: torch.device):
        self._answering, self._cache, self._device = answering, cache, device

    def shape_of(self, shape: Shape) -> Shape:
        """The shape that a pass is filled up to."""
        return shape

    def __call__(self, inputs: PassInputs) -> torch.Tensor:
        """Logits (B, C, V)."""
        new = parts(torch.from_numpy(inputs.flat).to(self._device), inputs.shape)
        tokens, chars = _aimed(self._cache, inputs, new, inputs.longest)
        return self._answering(tokens, chars)


def _aimed(cache: Cache, inputs: PassInputs, new: tuple[Any, Any, Any], longest: int) -> tuple[Slots, Slots]:
    """Aim the cache at a pass whose inputs, on the device, are `new`; its tokens and chars."""
    n_tokens = inputs.shape[1]
    cache.aim(inputs.rows, new, n_tokens, longest)
    return slots_of("token", new[0][:, :n_tokens]), slots_of("char", new[0][:, n_tokens:])


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    staging: torch.Tensor  # pinned
    inputs: torch.Tensor
    logits: torch.Tensor


def _is_recorded(shape: Shape) -> bool:
    return shape[1] <= _GRAPH_TOKENS[-1] and shape[2] <= _GRAPH_CHARS[-1]


class Graphs:
    """Runs passes of few slots as CUDA graphs, one for each shape and size of the cache: a launch for a whole pass."""

    def __init__(self, answering: Answering, cache: Cache, device: torch.device):
        self._answering, self._cache, self._device = answering, cache, device
        self._eager = Eager(answering, cache, device)
        self._recorded: dict[Shape, _Recorded] = {}
        self._room = (0, 0)

    def shape_of(self, shape: Shape) -> Shape:
        """The shape that a pass is filled up to: one of few, so that its graph can be used again."""
        b, t, c = shape
        if not _is_recorded(shape):
            return shape
        return (
            1 << (b - 1).bit_length(),
            min(n for n in _GRAPH_TOKENS if n >= t),
            min(n for n in _GRAPH_CHARS if n >= c),
        )

    def __call__(self, inputs: PassInputs) -> torch.Tensor:
        """Logits (B, C, V)."""
        shape = inputs.shape
        if inputs.rows.start or not _is_recorded(shape):
            return self._eager(inputs)
        room = self._cache.row_capacity, self._cache.token_capacity
        if room != self._room:  # the cache's buffers are others now
            self._recorded.clear()
            self._room = room
        if shape not in self._recorded:
            self._recorded[shape] = self._record(inputs)
        recorded = self._recorded[shape]
        recorded.staging.copy_(torch.from_numpy(inputs.flat))
        recorded.inputs.copy_(recorded.staging, non_blocking=True)
        recorded.graph.replay()
        return recorded.logits

    def _record(self, inputs: PassInputs) -> _Recorded:
        staging = torch.from_numpy(inputs.flat).pin_memory()
        static = staging.to(self._device)
        new = parts(static, inputs.shape)
        tokens, chars = _aimed(self._cache, inputs, new, self._cache.token_capacity)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):  # what is made at the first call is not to be recorded
            self._answering(tokens, chars)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._answering(tokens, chars)
        return _Recorded(graph, staging, static, logits)
