"""What one pass of the model shows to people: who attended to whom, and what every char costs.

B rows, T token slots, C char slots, N = T + C, H heads, D head width, V chars and specials.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from data_pipeline.layout import IGNORED, Slots
from tidal_dist.model.attention import Biases, attend_chars, attend_tokens
from tidal_dist.model.transformer import Layer, TidalTransformer

_ALTERNATIVES = 3  # likeliest ids kept for every char


@dataclass(frozen=True)
class LayerMap:
    """The attention of one layer in a pass over one row; weights are computed when asked for, head by head.

    Attributes:
        layer: index of the layer.
        queries: (1, H, Q, D), of all slots; in the last layer of the chars alone. keys: (1, H, T or N, D).
        n_tokens: T. biases: of the pass.
    """

    layer: int
    queries: torch.Tensor
    keys: torch.Tensor
    n_tokens: int
    biases: Biases

    @property
    def n_heads(self) -> int:
        """Number of heads."""
        return self.keys.shape[1]

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
        q, k = self._of_head(head)
        q, k = q[:, :, : self.n_tokens], k[:, :, : self.n_tokens]
        return attend_tokens(q, k, _columns(k, keys), _head_of(self.biases.token, head).to(q.dtype))[0, 0].cpu()

    def of_chars(self, head: int, keys: torch.Tensor | None = None, first: int | None = None) -> torch.Tensor:
        """Weights of the chars, or of the `first` ones, on all N slots, or on K `keys` alone; where chars pass.

        (C or first, N or K) on the CPU. Of a long row all weights are many times what the pass itself needs.
        """
        q, k = self._of_head(head)
        n, n_chars = self.n_tokens, k.shape[2] - self.n_tokens
        first = n_chars if first is None else first
        values = _columns(k, keys)
        token_kv, char_kv = (k[:, :, :n], values[:, :, :n]), (k[:, :, n:], values[:, :, n:])
        groups = [
            replace(group, bias=_head_of(group.bias, head).to(q.dtype))
            for group in self.biases.groups
            if group.chars.start < first
        ]
        return attend_chars(q[:, :, -n_chars:], token_kv, char_kv, groups)[0, 0, :first].cpu()

    def _of_head(self, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys of one head in at least float32: numpy and a person's eye want more than bf16."""
        dtype = torch.promote_types(self.keys.dtype, torch.float32)
        return self.queries[:, head : head + 1].to(dtype), self.keys[:, head : head + 1].to(dtype)


def _columns(k: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
    """Columns of the identity, (1, 1, n, K): attention over such values returns its weights on n slots' `keys`."""
    slots = torch.arange(k.shape[2], device=k.device)
    wanted = slots if keys is None else keys.to(k.device)
    return (slots[:, None] == wanted).to(k.dtype)[None, None]


def _head_of(bias: torch.Tensor, head: int) -> torch.Tensor:
    return bias if bias.shape[1] == 1 else bias[:, head : head + 1]


@dataclass
class _Pass:
    """What hooks saw of one layer in one pass."""

    arguments: tuple[Any, ...] = ()
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)

    def as_map(self, layer: Layer) -> LayerMap:
        n_tokens, biases, angles = self.arguments
        keys, _ = self.outputs["key_value"].chunk(2, dim=-1)
        return LayerMap(layer.index, *layer.queries_and_keys(self.outputs["query"], keys, angles), n_tokens, biases)


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
