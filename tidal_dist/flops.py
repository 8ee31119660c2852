"""FLOPs of the two-stream model, reckoned from its shape.

A multiply-add is 2 FLOPs; a backward pass costs twice its forward pass (Kaplan et al. 2020, section 2.1; Chowdhery et
al. 2022, PaLM, appendix B). Counted are matrix products alone: embeddings, norms, rotations, softmax and the optimizer
are left out. All slots of a row count, padding too. Three figures, from what is needed to what a device does:

- model FLOPs (`forward`, `training`), for utilisation: a query attends to all T token slots of its row, which is PaLM's
  convention and counts pairs that the mask hides; a char also to the W slots of the longest block. No recomputation.
- of those, `visible_forward`: only pairs that the mask can let through where one document fills the row.
- hardware FLOPs (`hardware`): the most that kernels compute, where they do not ask which tokens a row's queries see
  (`split` on a GPU), with the pairs that groups of chars make in vain, and with layers computed again by activation
  checkpointing. Kernels that leave out what nobody sees compute less: FlexAttention, and `split` on a CPU. What an
  attention kernel recomputes inside is not counted: its backward pass makes the scores again, half of its forward pass.

T token slots, C char slots, N = T + C, W char slots of the longest block.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

from data_pipeline.segmentation import SegmentationConfig
from data_pipeline.tokenizer import OUTPUT_VOCABULARY
from tidal_dist.model.groups import char_groups
from tidal_dist.settings import ModelConfig, TrainingConfig

_BACKWARD = 2  # times the forward pass: one product for the inputs' gradient, one for the weights'


@dataclass(frozen=True)
class LayerFlops:
    """FLOPs of one layer in the forward pass over one row, by part.

    Attributes:
        projections: queries, keys, values and the output of attention. mlp: the feed-forward part.
        token_attention: tokens over tokens. char_token_attention: chars over tokens.
        char_attention: chars over the W slots of a block. char_attention_in_vain: over others of their group.
    """

    projections: int
    mlp: int
    token_attention: int
    char_token_attention: int
    char_attention: int
    char_attention_in_vain: int

    @property
    def model(self) -> int:
        """What the definition needs."""
        return self.computed - self.char_attention_in_vain

    @property
    def computed(self) -> int:
        """What the kernels compute."""
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def visible(self) -> int:
        """What the mask lets through where one document fills the row: about half of all pairs."""
        attention = self.token_attention + self.char_token_attention + self.char_attention
        return self.projections + self.mlp + attention // 2


@dataclass(frozen=True)
class RowFlops:
    """FLOPs of the forward pass over one row: by layer, lowest first, and beside the layers.

    Attributes:
        handoff: the projections of token states for the chars that enter. output: logits of the supervised chars.
    """

    layers: tuple[LayerFlops, ...]
    handoff: int
    output: int

    @property
    def forward(self) -> int:
        """Model FLOPs of a forward pass."""
        return self._total(lambda layer: layer.model)

    @property
    def training(self) -> int:
        """Model FLOPs of a training step: forward and backward, nothing computed again."""
        return (1 + _BACKWARD) * self.forward

    @property
    def visible_forward(self) -> int:
        """Forward FLOPs of which the mask hides nothing, where one document fills the row."""
        return self._total(lambda layer: layer.visible)

    def hardware(self, recomputed: frozenset[int] = frozenset()) -> int:
        """FLOPs that a training step makes where these layers are computed again in the backward pass."""
        again = sum(layer.computed for i, layer in enumerate(self.layers) if i in recomputed)
        return (1 + _BACKWARD) * self._total(lambda layer: layer.computed) + again

    def parts(self) -> dict[str, int]:
        """Forward FLOPs by part; together `forward`, but for `char_attention_in_vain`."""
        by_layer = {f.name: sum(getattr(layer, f.name) for layer in self.layers) for f in fields(LayerFlops)}
        return by_layer | {"handoff": self.handoff, "output": self.output}

    def _total(self, of_layer: Callable[[LayerFlops], int]) -> int:
        return sum(of_layer(layer) for layer in self.layers) + self.handoff + self.output


def row_flops(
    model: ModelConfig,
    row_tokens: int,
    row_chars: int,
    max_block_bytes: int = SegmentationConfig().max_block_bytes,
    labels: int | None = None,
    output_size: int = OUTPUT_VOCABULARY,
) -> RowFlops:
    """FLOPs of one row of `row_tokens` token and `row_chars` char slots; in training, where a draft head takes part.

    Args:
        labels: supervised chars, of which alone there are logits; none: all of the row.
        output_size: ids to choose from.
    """
    longest_run = max_block_bytes + 1 if model.writes == "blocks" else row_chars
    layers = tuple(_layer(model, i, row_tokens, row_chars, longest_run) for i in range(model.n_layers))
    has_drafts = model.draft_layers is not None
    handoff = 2 * row_tokens * model.width**2 * (model.has_handoff + has_drafts)
    output = 2 * (row_chars if labels is None else labels) * model.width * output_size * (1 + has_drafts)
    return RowFlops(layers, handoff, output)


def recomputed_layers(model: ModelConfig, training: TrainingConfig) -> frozenset[int]:
    """The layers that activation checkpointing computes again: of every k the first."""
    if not training.activation_checkpointing:
        return frozenset()
    return frozenset(range(0, model.n_layers, training.activation_checkpoint_every_layers))


def _layer(model: ModelConfig, index: int, row_tokens: int, row_chars: int, longest_run: int) -> LayerFlops:
    chars = row_chars if index >= model.n_layers - model.char_depth else 0
    # A draft head's chars pass beside the others, which they do not see.
    times = 2 if model.draft_entry is not None and index >= model.draft_entry else 1
    # Nothing reads the last layer's tokens: they are keys and values there, and ask nothing.
    tokens_asking = 0 if index == model.n_layers - 1 else row_tokens
    asking, slots = tokens_asking + times * chars, row_tokens + times * chars
    matrices = 3 if model.mlp == "swiglu" else 2
    pair = 4 * model.width  # a score and a weighted value, over all heads
    own = chars * min(longest_run, max(chars, 1))
    grouped = sum(asking * asked for asking, asked in char_groups(chars, longest_run))
    return LayerFlops(
        projections=2 * model.width**2 * (2 * asking + 2 * slots),
        mlp=2 * matrices * asking * model.width * model.hidden_width,
        token_attention=pair * tokens_asking * row_tokens,
        char_token_attention=pair * times * chars * row_tokens,
        char_attention=pair * times * own,
        char_attention_in_vain=pair * times * (grouped - own),
    )
