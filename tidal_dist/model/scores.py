"""What is added to a score of attention: the layout's predicate and alibi, as numbers.

B rows, Q queries, K keys, H heads.
"""

from dataclasses import dataclass

import torch

from data_pipeline.layout import Slots, TokenAttention, may_see
from tidal_dist.model.positions import alibi_bias


@dataclass(frozen=True)
class Scoring:
    """How a score comes about, beside queries and keys: the model's settings that the biases depend on.

    Attributes:
        dtype: of queries and keys. head_width: D, which some kernels refuse; None: not looked at.
    """

    token_attention: TokenAttention
    alibi_heads: int | None
    dtype: torch.dtype
    head_width: int | None = None


def bias(query: Slots, key: Slots, scoring: Scoring) -> torch.Tensor:
    """Bias of every query slot to every key slot, (B, 1 or H, Q, K)."""
    return bias_of(visible(query, key, scoring), query, key, scoring)


def visible(query: Slots, key: Slots, scoring: Scoring) -> torch.Tensor:
    """Who sees whom, (B, Q, K) bool; of slots that hold numpy arrays, an array."""
    return may_see(query.queries(), key.keys(), scoring.token_attention)


def bias_of(visible: torch.Tensor, query: Slots, key: Slots, scoring: Scoring) -> torch.Tensor:
    """0 or alibi's bias where the query sees the key, a floor elsewhere, (B, 1 or H, Q, K); `visible`: (B, Q, K)."""
    visible = visible[:, None]
    # Finite, so that a slot that sees nothing (padding) gets no NaN; half the range, so that adding cannot overflow.
    floor = torch.finfo(scoring.dtype).min / 2
    if scoring.alibi_heads is None:
        return torch.zeros(visible.shape, dtype=scoring.dtype, device=visible.device).masked_fill_(~visible, floor)
    positions = query.position[:, :, None], key.position[:, None, :]
    return alibi_bias(*positions, scoring.alibi_heads, scoring.dtype).masked_fill_(~visible, floor)
