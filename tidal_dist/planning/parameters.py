"""How many parameters a model has, from its configuration alone."""

from dataclasses import dataclass

from data_pipeline.layout import place_count
from data_pipeline.tokenizer import OUTPUT_VOCABULARY
from tidal_dist.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Attributes:
        embeddings: of ids and of places. layer: of each layer. n_layers: how many there are.
        others: the handoffs, the last norm and the output.
        gains: those of all that are the gains of norms; ZeRO-3 keeps such small ones whole on every rank.
    """

    embeddings: int
    layer: int
    n_layers: int
    others: int
    gains: int

    @property
    def layers(self) -> int:
        """Of all layers."""
        return self.layer * self.n_layers

    @property
    def total(self) -> int:
        """All of them."""
        return self.embeddings + self.layers + self.others


def parameters(model: ModelConfig, vocab_size: int, max_block_bytes: int) -> Parameters:
    """Count the parameters of the model that training would build.

    Args:
        vocab_size: chars and specials included.
    """
    width = model.width
    places = place_count(max_block_bytes, model.place_shift) if model.places else 0
    matrices = 3 if model.mlp == "swiglu" else 2
    handoffs = model.has_handoff + (model.draft_layers is not None)
    norms = 2 * model.n_layers + 1 + handoffs
    return Parameters(
        embeddings=(vocab_size + places) * width,
        layer=4 * width**2 + matrices * width * model.hidden_width + 2 * width,
        n_layers=model.n_layers,
        others=handoffs * (width**2 + width) + width + OUTPUT_VOCABULARY * width,
        gains=norms * width,
    )
