"""What one pass of the model shows to people: who attended to whom, and what every char costs.

B rows, T token slots, C char slots, N = T + C, H heads, D head width, V chars and specials.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from data_pipeline.layout import IGNORED, Slots
from tidal_dist.model.attention import Prepared
from tidal_dist.model.transformer import Layer, TidalTransformer

_ALTERNATIVES = 3  # likeliest ids kept for every char


@dataclass(frozen=True)
class LayerMap:
    """The attention of one layer in a pass over one row; weights are computed when asked for, head by head.

    Attributes:
        layer: index of the layer.
        queries: (1, H, Q, D), of all slots; in the last layer of the chars alone. keys: (1, H, T or N, D).
        prepared: what attention knew of the row.
    """

    layer: int
    queries: torch.Tensor
    keys: torch.Tensor
    prepared: Prepared

    @property
    def n_heads(self) -> int:
        """Number of heads."""
        return self.keys.shape[1]

    @property
    def n_tokens(self) -> int:
        """T."""
        return self.prepared.n_tokens

    @property
    def has_chars(self) -> bool:
        """Whether chars pass this layer."""
        return self.keys.shape[2] > self.n_tokens

    @property
    def has_token_queries(self) -> bool:
        """Whether tokens attend in this layer: in the last one they do not, since nothing reads their states."""
        return self.queries.shape[2] == self.keys.shape[2]

    def of_tokens(self, head: int, keys: torch.Tensor | None = None) -> torch.Tensor:
        """Weights of tokens on tokens, (T, T) on the CPU, or (T, K) on K `keys` alone; where tokens attend."""
        n = self.n_tokens
        weights = self._weights(head, slice(0, n))[:, :n]
        return weights if keys is None else weights[:, keys.cpu()]

    def of_chars(self, head: int, keys: torch.Tensor | None = None, first: int | None = None) -> torch.Tensor:
        """Weights of the chars, or of the `first` ones, on all N slots, or on K `keys` alone; where chars pass.

        (C or first, N or K) on the CPU. Of a long row all weights are many times what the pass itself needs.
        """
        n, n_slots = self.n_tokens, self.keys.shape[2]
        weights = self._weights(head, slice(n, n_slots if first is None else n + first))
        return weights if keys is None else weights[:, keys.cpu()]

    def _weights(self, head: int, asking: slice) -> torch.Tensor:
        """Weights of these of the N slots on all that pass this layer, on the CPU.

        In at least float32: numpy and a person's eye want more than bf16.
        """
        n_slots = self.keys.shape[2]
        first = n_slots - self.queries.shape[2]
        dtype = torch.promote_types(self.keys.dtype, torch.float32)
        q = self.queries[0, head, asking.start - first : asking.stop - first].to("cpu", dtype)
        k = self.keys[0, head].to("cpu", dtype)
        table = self.prepared.table(asking)[0, :, :, :n_slots]
        # Finite, so that padding, which may have no scores at all, is not NaN.
        bias = table[head if len(table) > 1 else 0].to(dtype).clamp_min(torch.finfo(dtype).min / 2)
        return (q @ k.mT * k.shape[1] ** -0.5 + bias).softmax(dim=-1)


@dataclass
class _Pass:
    """What hooks saw of one layer in one pass."""

    arguments: tuple[Any, ...] = ()
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)

    def as_map(self, layer: Layer) -> LayerMap:
        _, prepared, angles = self.arguments
        keys, _ = self.outputs["key_value"].chunk(2, dim=-1)
        return LayerMap(layer.index, *layer.queries_and_keys(self.outputs["query"], keys, angles), prepared)


@contextmanager
def recorded_maps(model: TidalTransformer) -> Iterator[list[LayerMap]]:
    """A list that has the maps of all layers, lowest first, once the block has made one pass over one row.

    They come from what the pass itself computed: weights that are partitioned over ranks are not touched.
    """
    maps: list[LayerMap] = []
    passes = [(layer, _Pass()) for layer in model.layers if isinstance(layer, Layer)]
    handles = [handle for layer, seen in passes for handle in _watch(layer, seen)]
    try:
        yield maps
        maps += [seen.as_map(layer) for layer, seen in passes]
    finally:
        for handle in handles:
            handle.remove()


def _watch(layer: Layer, seen: _Pass) -> Iterator[torch.utils.hooks.RemovableHandle]:
    def keep_arguments(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.arguments = inputs[1:4]

    yield layer.register_forward_pre_hook(keep_arguments)
    for name in ("query", "key_value"):

        def keep_output(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor, name: str = name) -> None:
            seen.outputs[name] = output.detach()

        yield layer.get_submodule(name).register_forward_hook(keep_output)


@torch.no_grad()
def attention_maps(model: TidalTransformer, tokens: Slots, chars: Slots) -> list[LayerMap]:
    """The maps of all layers, lowest first, of one row: tokens (1, T), chars (1, C)."""
    with recorded_maps(model) as maps:
        model(tokens, chars)
    return maps


@dataclass(frozen=True)
class CharScores:
    """What the model says of each char, on the CPU, in at least float32.

    Attributes:
        nats: (C,) loss of the label. p: (C,) probability of the label. Both are NaN where there is no label.
        ids: (C, 3) the likeliest ids, likeliest first. probabilities: (C, 3) theirs.
    """

    nats: torch.Tensor
    p: torch.Tensor
    ids: torch.Tensor
    probabilities: torch.Tensor


def char_scores(logits: torch.Tensor, labels: torch.Tensor) -> CharScores:
    """Scores of one row: logits (C, V), labels (C,)."""
    logits = logits.detach().to("cpu", torch.promote_types(logits.dtype, torch.float32))
    labels = labels.cpu()
    nats = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    nats = nats.masked_fill(labels == IGNORED, float("nan"))
    top = logits.softmax(dim=-1).topk(_ALTERNATIVES, dim=-1)
    return CharScores(nats, (-nats).exp(), top.indices, top.values)
