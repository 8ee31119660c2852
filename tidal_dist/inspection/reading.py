"""What a model says of a document: the loss of every char, its alternatives, and where the chars look.

T token slots, C char slots, N = T + C.
"""

from dataclasses import dataclass

import torch

from data_pipeline.layout import Slots
from data_pipeline.stream import batch_of_rows
from tidal_dist.inspection.document import Shown
from tidal_dist.model.maps import CharScores, LayerMap, char_scores, recorded_maps
from tidal_dist.model.transformer import TidalTransformer


@dataclass(frozen=True)
class Shares:
    """The shares of one head's attention, on average over the chars; they add up to 1.

    Attributes:
        bos: of `<bos>`. last: of the last token before the block, unless that is `<bos>`.
        others: of the other tokens. own: of the block's own chars.
    """

    layer: int
    head: int
    bos: float
    last: float
    others: float
    own: float


@dataclass(frozen=True)
class Reading:
    """One pass of a model over a document: the scores of its C chars, the maps of all layers, the chars' shares."""

    scores: CharScores
    maps: list[LayerMap]
    shares: list[Shares]


@torch.no_grad()
def read(model: TidalTransformer, shown: Shown) -> Reading:
    """Pass a document through a model on the CPU, once."""
    batch = batch_of_rows([(shown.tokens, shown.chars, shown.labels)])
    with recorded_maps(model) as maps:
        logits = model(batch.tokens, batch.chars)
    own_row = batch.tokens.at(0), batch.chars.at(0)
    shares = [_shares(m, head, *own_row) for m in maps if m.has_chars for head in range(m.n_heads)]
    return Reading(char_scores(logits[0], batch.labels[0]), maps, shares)


def _shares(layer_map: LayerMap, head: int, tokens: Slots, chars: Slots) -> Shares:
    """Shares of one head. tokens: (T,) and chars: (C,) of the one row that the map is of."""
    n_tokens = len(tokens.ids)
    weights = layer_map.of_chars(head)
    of_tokens = weights[:, :n_tokens]
    keys = tokens.index[None, :]
    is_bos = keys == 0
    is_last = (keys == chars.start_pos[:, None] - 1) & ~is_bos

    def average(weights: torch.Tensor) -> float:
        return float(weights.sum(dim=-1).mean())

    return Shares(
        layer=layer_map.layer,
        head=head,
        bos=average(of_tokens * is_bos),
        last=average(of_tokens * is_last),
        others=average(of_tokens * ~(is_bos | is_last)),
        own=average(weights[:, n_tokens:]),
    )
