"""A plain decoder of the model's own layers: one stream, each position sees itself and all before it.

It is what the two-stream model is compared with: over bytes, with chars and specials to choose from, or over BPE
tokens, with the whole vocabulary. Of a `ModelConfig` it has no use for what makes two streams: char layers, handoff,
places, positions of chars, attention among tokens.

B rows, N positions, H heads, D head width, V ids to choose from.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from data_pipeline.layout import IGNORED
from data_pipeline.tokenizer import PAD
from tidal_dist.config import ModelConfig
from tidal_dist.model.nats import logits_or_nats
from tidal_dist.model.positions import alibi_bias, rope_angles
from tidal_dist.model.transformer import Checkpoint, Embedding, KeysValues, Layer, Linear

_MULTIPLE = 8  # of hidden widths, as in ModelConfig


class PlainLayer(nn.Module):
    """One layer of the two-stream model, over one stream."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.layer = Layer(config, index)

    def forward(self, x: torch.Tensor, angles: KeysValues | None, bias: torch.Tensor | None) -> torch.Tensor:
        """(B, N, width) -> (B, N, width); without a bias plainly causal, which fused kernels know by name."""
        q, k, v = self.layer.project(x, x.shape[1], angles)
        return self.layer.finish(x, F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None))


class PlainDecoder(nn.Module):
    """The decoder. `checkpoint(function, x)` runs every k-th layer, as in `TidalTransformer`.

    Args:
        vocab_size: ids that may be read. output_size: V, ids that may be predicted: 0 .. V - 1.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        output_size: int,
        checkpoint: Checkpoint | None = None,
        checkpoint_every_layers: int = 1,
    ):
        super().__init__()
        self.config = config
        self.checkpoint = checkpoint
        self.checkpoint_every_layers = checkpoint_every_layers
        self.embedding = Embedding(vocab_size, config.width)
        self.layers = nn.ModuleList(PlainLayer(config, i) for i in range(config.n_layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.output = Linear(config.width, output_size)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of ids (B, N): (B, N, V); or with labels (B, N) the sum of their cross-entropy in nats."""
        config = self.config
        x = self.embedding(ids) * config.width**0.5
        x = F.dropout(x, config.dropout, self.training) if config.dropout else x
        angles, bias = self._prepare(ids.shape[1], x)
        for i, layer in enumerate(self.layers):
            if self.checkpoint is not None and self.training and i % self.checkpoint_every_layers == 0:
                x = self.checkpoint(lambda inputs, layer=layer: layer(inputs, angles, bias), x)
            else:
                x = layer(x, angles, bias)
        return logits_or_nats(self.output, self.norm(x), labels)

    def _prepare(self, n: int, x: torch.Tensor) -> tuple[KeysValues | None, torch.Tensor | None]:
        """Rotary angles, or alibi's bias (1, H, N, N) with a floor where a later position would be seen."""
        config = self.config
        position = torch.arange(n, device=x.device)[None]
        if config.encoding == "rope":
            return rope_angles(position, config.width // config.n_heads, config.rope_base, x.dtype), None
        if config.encoding == "none":
            return None, None
        query, key = position[:, :, None], position[:, None, :]
        bias = alibi_bias(query, key, config.n_heads, x.dtype)
        return None, bias.masked_fill_(key > query, torch.finfo(x.dtype).min / 2)


def next_ids(ids: torch.Tensor) -> torch.Tensor:
    """Labels of ids (B, N): what stands behind each; none for the last, and none where that is padding."""
    labels = F.pad(ids[:, 1:], (0, 1), value=PAD)
    return labels.masked_fill(labels == PAD, IGNORED)


def plain_parameters(config: ModelConfig, vocab_size: int, output_size: int) -> int:
    """Number of parameters of a `PlainDecoder`."""
    layer = (4 * config.width + _matrices(config) * config.hidden_width + 2) * config.width
    return (vocab_size + output_size + 1) * config.width + config.n_layers * layer


def plain_flops(config: ModelConfig, positions: int, output_size: int, labels: int | None = None) -> int:
    """Model FLOPs of the forward pass over a row, reckoned as `tidal_dist.flops` does: all N x N pairs count.

    Args:
        labels: positions that have one, of which alone there are logits; none: all.
    """
    weights = 2 * config.width * (4 * config.width + _matrices(config) * config.hidden_width)
    pairs = 4 * config.width * positions
    outputs = 2 * (positions if labels is None else labels) * config.width * output_size
    return config.n_layers * positions * (weights + pairs) + outputs


def of_equal_size(config: ModelConfig, parameters: int, vocab_size: int, output_size: int) -> ModelConfig:
    """A configuration of as many layers and the same head width whose plain decoder has about so many parameters.

    Widths are whole heads; what a width leaves over goes to the feed-forward layers. Of all widths the one is taken
    whose feed-forward layers are nearest to `config`'s, in proportion.

    Raises:
        ValueError: the embeddings alone need more.
    """
    head = config.width // config.n_heads
    found = []
    for n_heads in range(1, config.n_heads * 8 + 1):
        sizes = {"width": n_heads * head, "n_heads": n_heads}
        bare = config.model_copy(update=sizes | {"mlp_width": 0})
        each = config.n_layers * _matrices(config) * bare.width * _MULTIPLE
        hidden = round((parameters - plain_parameters(bare, vocab_size, output_size)) / each) * _MULTIPLE
        if hidden > 0:
            uneven = abs(math.log(hidden / bare.width * config.width / config.hidden_width))
            found.append((uneven, bare.model_copy(update={"mlp_width": hidden})))
    if not found:
        raise ValueError(f"{parameters:,} parameters are too few for {vocab_size + output_size:,} rows of embeddings")
    return min(found, key=lambda pair: pair[0])[1]


def _matrices(config: ModelConfig) -> int:
    return 3 if config.mlp == "swiglu" else 2
