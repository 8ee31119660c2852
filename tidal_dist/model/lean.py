"""The model in as few calls as it takes: what a pass of a few slots costs on a CPU is calls, not products.

A call of a module costs as much as a small product, and so does each operation of a norm. `Lean` makes the passes of a
generation that `TidalTransformer` would make, from the same weights; masks, positions and angles are the model's own.
B rows, N slots, H heads, D head width. A test compares the two.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from data_pipeline.layout import NO_PLACE, Slots
from tidal_dist.model.attention import attend_cached

if TYPE_CHECKING:
    from tidal_dist.model.transformer import KeysValues, Layer, Past, TidalTransformer

MOST_WIDTH = 512  # beyond, products cost more than calls, and a copy of weights is not small


class Lean:
    """Stands for a model on a CPU, in evaluation mode. Holds copies of some weights as they are now."""

    def __init__(self, model: "TidalTransformer"):
        self._model = model
        config = model.config
        self._first_of_chars, self._scale = config.n_layers - config.char_depth, config.width**0.5
        self._layers = [_LeanLayer(layer) for layer in model.layers]  # type: ignore[arg-type]
        self._ids, self._norm, self._output = model.embedding.weight, _Norm(model.norm), model.output.weight
        self._places: torch.Tensor | None = None
        if config.places:
            self._places = model.place_embedding.weight.clone()
            self._places[NO_PLACE] = 0.0

    def __call__(self, tokens: Slots, chars: Slots, past: "Past") -> torch.Tensor:
        """Logits of the chars (B, C, V), as `TidalTransformer.forward` has them."""
        model, n_tokens, dtype = self._model, tokens.ids.shape[1], self._ids.dtype
        biases, angles = model.prepare(tokens, chars, dtype, past)
        turning = None if angles is None else _turning(angles)
        x = self._embed(tokens) if n_tokens else self._ids.new_empty(len(tokens.ids), 0, self._ids.shape[1])
        for i, layer in enumerate(self._layers):
            if i == self._first_of_chars:
                entering = self._embed(chars)
                if model.config.has_handoff:
                    entering = entering + model.hand_off(x, tokens, chars, past)
                x = torch.cat([x, entering], dim=1) if n_tokens else entering
            if x.shape[1]:
                x = layer(x, n_tokens, biases, turning, past)
        return F.linear(self._norm(x), self._output)

    def _embed(self, slots: Slots) -> torch.Tensor:
        x = F.embedding(slots.ids, self._ids)
        if self._places is not None:
            x = x + F.embedding(slots.place, self._places)
        return x * self._scale


def _turning(angles: "KeysValues") -> "KeysValues":
    """Cosines and signed sines for both halves of the head width, each (B, N, 1, D), of angles (B, 1, N, D / 2)."""
    cos, sin = (a.transpose(1, 2) for a in angles)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


class _Norm:
    """A root-mean-square norm in few operations."""

    def __init__(self, norm: torch.nn.RMSNorm):
        self._weight, self._width = norm.weight, norm.weight.numel()
        self._eps = norm.weight.new_full((1, 1, 1), norm.eps or 0.0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = x.reshape(-1, 1, self._width), x.reshape(-1, self._width, 1)
        scale = torch.baddbmm(self._eps, rows, columns, alpha=1.0 / self._width).rsqrt_()
        return (x * scale.view(*x.shape[:2], 1)).mul_(self._weight)


class _LeanLayer:
    """One layer; queries, keys and values come from one product and are rotated at once."""

    def __init__(self, layer: "Layer"):
        self._index, self._n_heads, self._is_last = layer.index, layer.n_heads, layer.is_last
        self._attention_norm, self._mlp_norm = _Norm(layer.attention_norm), _Norm(layer.mlp_norm)
        self._query_key_value = torch.cat([layer.query.weight, layer.key_value.weight])
        self._out, self._up, self._down = layer.out.weight, layer.mlp.up.weight, layer.mlp.down.weight
        self._is_gated = layer.mlp.gated

    def __call__(
        self,
        x: torch.Tensor,
        n_tokens: int,
        bias: torch.Tensor,
        turning: "KeysValues | None",
        past: "Past",
    ) -> torch.Tensor:
        """As `Layer.forward`: (B, N, width) -> (B, N, width), from the last layer only the chars."""
        b, n, width = x.shape
        first = n_tokens if self._is_last else 0
        heads = F.linear(self._attention_norm(x), self._query_key_value).view(b, n, 3 * self._n_heads, -1)
        query_key, value = heads.split([2 * self._n_heads, self._n_heads], dim=2)
        if turning is not None:
            cos, sin = turning if turning[0].shape[1] == n else (a[:, :n] for a in turning)
            query_key = torch.addcmul(query_key * cos, query_key.roll(query_key.shape[-1] // 2, -1), sin)
        query, key = query_key.transpose(1, 2).chunk(2, dim=1)
        kv = past.extend(self._index, key, value.transpose(1, 2))
        y = attend_cached(query[:, :, first:] if first else query, kv, bias, first)
        x = (x[:, first:] if first else x) + F.linear(y.transpose(1, 2).reshape(b, n - first, width), self._out)
        return x + self._feed_forward(self._mlp_norm(x))

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(x, self._up)
        if not self._is_gated:
            return F.linear(F.gelu(hidden), self._down)
        gate, value = hidden.chunk(2, dim=-1)
        return F.linear(F.silu(gate).mul_(value), self._down)
