"""Passes of the model over a cache: as they come, or on a GPU as recorded graphs.

B sequences of a pass, T token and C char slots of each, V ids of the output vocabulary, F arrays of `Slots`.
"""

from dataclasses import dataclass
from types import MethodType

import numpy as np
import torch

from data_pipeline.layout import Slots
from tidal_dist.generation.cache import ARRAYS, Cache
from tidal_dist.model.transformer import Layer, TidalTransformer

Shape = tuple[int, int, int]  # B, T, C
_GRAPH_TOKENS = (0, 1, 2, 4, 8, 16)  # T of passes that are recorded; passes with more are run as they come
_GRAPH_CHARS = (1, 4, 8, 16, 32)
_SHAPES = 256  # that are compiled at most


@dataclass(frozen=True)
class PassInputs:
    """What a pass takes.

    Attributes:
        rows: the cache's sequences. tokens: Slots (B, T). chars: Slots (B, C). All on the CPU, int64 when flattened.
        counts: (2, B), tokens and chars that are kept from earlier passes. longest: tokens of the longest after it.
    """

    rows: slice
    tokens: Slots
    chars: Slots
    counts: np.ndarray
    longest: int

    @property
    def shape(self) -> Shape:
        """B, T, C."""
        return *self.tokens.ids.shape, self.chars.ids.shape[1]

    def flat(self) -> np.ndarray:
        """Everything in one array of int64, for one copy to the device."""
        arrays = [getattr(s, name) for s in (self.tokens, self.chars) for name in ARRAYS]
        return np.concatenate([a.ravel() for a in (*arrays, self.counts)], dtype=np.int64)


def _unflat(flat: torch.Tensor, shape: Shape) -> tuple[Slots, Slots, torch.Tensor]:
    """Tokens, chars and counts as views of what `PassInputs.flat` made."""
    b, t, c = shape
    tokens, chars, counts = flat.split([len(ARRAYS) * b * t, len(ARRAYS) * b * c, 2 * b])
    streams = Slots("token", *tokens.view(len(ARRAYS), b, t)), Slots("char", *chars.view(len(ARRAYS), b, c))
    return *streams, counts.view(2, b)


class Eager:
    """Runs a pass as it comes."""

    def __init__(self, model: TidalTransformer, cache: Cache, device: torch.device):
        self._model, self._cache, self._device = model, cache, device

    def shape_of(self, shape: Shape) -> Shape:
        """The shape that a pass is filled up to."""
        return shape

    def __call__(self, inputs: PassInputs) -> torch.Tensor:
        """Logits (B, C, V)."""
        tokens, chars, counts = _unflat(torch.from_numpy(inputs.flat()).to(self._device), inputs.shape)
        self._cache.aim(inputs.rows, counts, inputs.longest)
        return self._model(tokens, chars, past=self._cache)


def compile_layers(model: TidalTransformer) -> None:
    """Have all that layers do beside attention compiled: fewer, larger kernels on a GPU, after a minute at the start.

    One compilation serves all layers, each shape of a pass takes one of its own.
    """
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, _SHAPES)
    project, finish = (torch.compile(method, dynamic=False) for method in (Layer.project, Layer.finish))
    for layer in model.layers:
        vars(layer).update(project=MethodType(project, layer), finish=MethodType(finish, layer))


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

    def __init__(self, model: TidalTransformer, cache: Cache, device: torch.device):
        self._model, self._cache, self._device = model, cache, device
        self._eager = Eager(model, cache, device)
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
        recorded.staging.copy_(torch.from_numpy(inputs.flat()))
        recorded.inputs.copy_(recorded.staging, non_blocking=True)
        recorded.graph.replay()
        return recorded.logits

    def _record(self, inputs: PassInputs) -> _Recorded:
        staging = torch.from_numpy(inputs.flat()).pin_memory()
        static = staging.to(self._device)
        tokens, chars, counts = _unflat(static, inputs.shape)
        self._cache.aim(inputs.rows, counts, self._cache.token_capacity)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):  # what is made at the first call is not to be recorded
            self._model(tokens, chars, past=self._cache)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._model(tokens, chars, past=self._cache)
        return _Recorded(graph, staging, static, logits)
