"""The one attention function of the two streams.

B rows, T token slots, C char slots, K keys, H heads, D head width, W char slots of the longest block.

Tokens attend to tokens. Chars attend to tokens and, within their block, to chars: a block's run is contiguous and at
most W long, so a group of G consecutive chars needs, beside tokens, only its own slots and the W before it. The cost
is that of T x T and C x (T + G + W) pairs, not of (T + C)^2; on a CPU a group also leaves out the tokens before the
first and behind the last that any of its chars may see. Scores over tokens and chars share one softmax.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data_pipeline.layout import Slots, TokenAttention, may_see
from tidal_dist.model.positions import alibi_bias

# A group is this many times W: fewer pairs that no char sees against fewer, larger calls.
_RUNS_PER_GROUP = 4


@dataclass(frozen=True)
class Group:
    """Consecutive chars that attend together.

    Attributes:
        chars: their slots. token_keys, char_keys: the slots that they attend to.
        bias: (B, 1 or H, chars, token keys + char keys).
    """

    chars: slice
    token_keys: slice
    char_keys: slice
    bias: torch.Tensor


@dataclass(frozen=True)
class Biases:
    """What is added to the scores: 0 or alibi's bias where the query may see the key, a floor elsewhere.

    Attributes:
        token: tokens to tokens, (B, 1 or H, T, K). groups: all chars, in their order.
    """

    token: torch.Tensor
    groups: list[Group]


@dataclass(frozen=True)
class Scoring:
    """How a score comes about, beside queries and keys: the model's settings that the biases depend on."""

    token_attention: TokenAttention
    alibi_heads: int | None
    dtype: torch.dtype


def bias(query: Slots, key: Slots, scoring: Scoring) -> torch.Tensor:
    """Bias of every query slot to every key slot, (B, 1 or H, Q, K)."""
    return _bias(_visible(query, key, scoring), query, key, scoring)


def _visible(query: Slots, key: Slots, scoring: Scoring) -> torch.Tensor:
    """Who sees whom, (B, Q, K) bool."""
    return may_see(query.queries(), key.keys(), scoring.token_attention)


def _bias(visible: torch.Tensor, query: Slots, key: Slots, scoring: Scoring) -> torch.Tensor:
    visible = visible[:, None]
    # Finite, so that a slot that sees nothing (padding) gets no NaN; half the range, so that adding cannot overflow.
    floor = torch.finfo(scoring.dtype).min / 2
    if scoring.alibi_heads is None:
        return torch.zeros(visible.shape, dtype=scoring.dtype, device=visible.device).masked_fill_(~visible, floor)
    positions = query.position[:, :, None], key.position[:, None, :]
    return alibi_bias(*positions, scoring.alibi_heads, scoring.dtype).masked_fill_(~visible, floor)


def biases(tokens: Slots, chars: Slots, longest_run: int, scoring: Scoring) -> Biases:
    """All biases of one pass over whole rows.

    Args:
        longest_run: W, char slots of the longest block, `<bob>` included.
    """
    n_chars, size = chars.ids.shape[1], longest_run * _RUNS_PER_GROUP
    groups = []
    for start in range(0, n_chars, size):
        asking = slice(start, min(start + size, n_chars))
        asked = slice(max(start - longest_run, 0), asking.stop)
        query = chars.map(lambda a, s=asking: a[:, s])
        visible = _visible(query, tokens, scoring)
        seen = _seen(visible)
        on_tokens = _bias(visible[:, :, seen], query, tokens.map(lambda a, s=seen: a[:, s]), scoring)
        on_chars = bias(query, chars.map(lambda a, s=asked: a[:, s]), scoring)
        groups.append(Group(asking, seen, asked, torch.cat([on_tokens, on_chars], dim=-1)))
    return Biases(bias(tokens, tokens, scoring), groups)


def cached_bias(tokens: Slots, chars: Slots, key_tokens: Slots, key_chars: Slots, scoring: Scoring) -> torch.Tensor:
    """Bias of a decoding pass, (B, 1 or H, T + C, K): tokens, then chars, on all cached chars, then all tokens."""
    asking = [query for query in (tokens, chars) if query.ids.shape[1]]
    rows = [torch.cat([bias(query, key, scoring) for key in (key_chars, key_tokens)], dim=-1) for query in asking]
    return torch.cat(rows, dim=2)


def _seen(visible: torch.Tensor) -> slice:
    """From the first to the last key that any query sees; on a GPU all keys, since asking would wait for it."""
    if visible.device.type != "cpu":
        return slice(0, visible.shape[2])
    columns = visible.any(dim=1).any(dim=0).nonzero()
    return slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 0)


def attend_cached(
    q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], cached_bias: torch.Tensor, first: int
) -> torch.Tensor:
    """The slots from `first` on over a cache: q (B, H, Q, D), keys and values (B, H, K, D) each -> (B, H, Q, D)."""
    if not q.shape[2]:  # a pass may feed no tokens: the layers below the chars then have nothing to do
        return q
    return F.scaled_dot_product_attention(q, *kv, attn_mask=cached_bias[:, :, first : first + q.shape[2]])


def attend_tokens(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Tokens over tokens: q (B, H, T, D), k and v (B, H, K, D) -> (B, H, T, D)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def attend_chars(
    q: torch.Tensor,
    token_kv: tuple[torch.Tensor, torch.Tensor],
    char_kv: tuple[torch.Tensor, torch.Tensor],
    groups: list[Group],
) -> torch.Tensor:
    """Chars over tokens and chars: q (B, H, C, D), keys and values (B, H, K, D) each -> (B, H, C, D)."""
    outputs = []
    for group in groups:
        k, v = (
            torch.cat([on_tokens[:, :, group.token_keys], on_chars[:, :, group.char_keys]], dim=2)
            for on_tokens, on_chars in zip(token_kv, char_kv, strict=True)
        )
        outputs.append(F.scaled_dot_product_attention(q[:, :, group.chars], k, v, attn_mask=group.bias))
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
