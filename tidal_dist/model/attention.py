"""The one attention function of the two streams.

B rows, T token slots, C char slots, K keys, H heads, D head width, W char slots of the longest block.

Tokens attend to tokens. Chars attend to tokens and, within their block, to chars: since a block's run is contiguous
and at most W long, a char needs to look only at its own chunk of W slots and the one before. The cost is that of
T x T and C x (T + 2 W) pairs, not of (T + C)^2. Scores of one char over tokens and chars share one softmax.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data_pipeline.layout import Slots, TokenAttention, may_see
from tidal_dist.model.positions import alibi_bias


@dataclass(frozen=True)
class Biases:
    """What is added to the scores: 0 or alibi's bias where the query may see the key, a floor elsewhere.

    Attributes:
        token: (B, 1 or H, T, K).
        char: (B, 1 or H, C, K).
        local: chars to chars, (B, 1 or H, C, K') or, in chunks, (B, 1 or H, C / W, W, 2 W).
        chunk: W where chars are cut in chunks, else None.
    """

    token: torch.Tensor
    char: torch.Tensor
    local: torch.Tensor
    chunk: int | None


@dataclass(frozen=True)
class Scoring:
    """How a score comes about, beside queries and keys: the model's settings that the biases depend on."""

    token_attention: TokenAttention
    alibi_heads: int | None
    dtype: torch.dtype


def bias(query: Slots, key: Slots, scoring: Scoring) -> torch.Tensor:
    """Bias of every query slot to every key slot, (B, 1 or H, ..., Q, K)."""
    query, key = query.queries(), key.keys()
    visible = may_see(query, key, scoring.token_attention)[:, None]
    # Finite, so that a slot that sees nothing (padding) gets no NaN; half the range, so that adding cannot overflow.
    floor = torch.finfo(scoring.dtype).min / 2
    if scoring.alibi_heads is None:
        return torch.zeros(visible.shape, dtype=scoring.dtype, device=visible.device).masked_fill_(~visible, floor)
    slopes = alibi_bias(query.position, key.position, scoring.alibi_heads).to(scoring.dtype)
    return slopes.masked_fill(~visible, floor)


def biases(
    tokens: Slots, chars: Slots, key_tokens: Slots, key_chars: Slots, longest_run: int, scoring: Scoring
) -> Biases:
    """All biases of one pass.

    Args:
        tokens, chars: the slots that ask; key_tokens, key_chars: those that are asked, cached ones included.
        longest_run: W, char slots of the longest block, `<bob>` included.
    """
    n_chars = chars.ids.shape[1]
    # With few chars, all pairs are no more than the chunks' pairs; a decoding step has cached keys and few queries.
    chunked = n_chars > 2 * longest_run and key_chars.ids.shape[1] == n_chars
    if chunked:
        local = bias(
            chars.map(lambda a: _chunks(a, longest_run)),
            key_chars.map(lambda a: _with_previous(_chunks(a, longest_run))),
            scoring,
        )
    else:
        local = bias(chars, key_chars, scoring)
    return Biases(
        token=bias(tokens, key_tokens, scoring),
        char=bias(chars, key_tokens, scoring),
        local=local,
        chunk=longest_run if chunked else None,
    )


def _chunks(array: torch.Tensor, size: int) -> torch.Tensor:
    """(B, C) -> (B, ceil(C / size), size), filled up with zeros, which is padding."""
    return F.pad(array, (0, -array.shape[1] % size)).unflatten(1, (-1, size))


def _with_previous(chunks: torch.Tensor) -> torch.Tensor:
    """(B, n, W) -> (B, n, 2 W): each chunk behind the one before it; before the first stands padding."""
    return torch.cat([F.pad(chunks, (0, 0, 1, -1)), chunks], dim=-1)


def attend_tokens(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Tokens over tokens: q (B, H, T, D), k and v (B, H, K, D) -> (B, H, T, D)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def attend_chars(
    q: torch.Tensor,
    token_kv: tuple[torch.Tensor, torch.Tensor],
    char_kv: tuple[torch.Tensor, torch.Tensor],
    biases: Biases,
) -> torch.Tensor:
    """Chars over tokens and chars: q (B, H, C, D), keys and values (B, H, K, D) each -> (B, H, C, D)."""
    (k_t, v_t), (k_c, v_c) = token_kv, char_kv
    q = q * q.shape[-1] ** -0.5
    far = q @ k_t.transpose(-1, -2) + biases.char
    if biases.chunk is None:
        near = q @ k_c.transpose(-1, -2) + biases.local
        weights = torch.cat([far, near], dim=-1).softmax(dim=-1)
        on_tokens, on_chars = weights.split([far.shape[-1], near.shape[-1]], dim=-1)
        return on_tokens @ v_t + on_chars @ v_c
    w, n_chars = biases.chunk, q.shape[2]
    near = _vector_chunks(q, w) @ _vectors_with_previous(_vector_chunks(k_c, w)).transpose(-1, -2) + biases.local
    near = near.flatten(2, 3)[:, :, :n_chars]
    weights = torch.cat([far, near], dim=-1).softmax(dim=-1)
    on_tokens, on_chars = weights.split([far.shape[-1], 2 * w], dim=-1)
    local = _vector_chunks(on_chars, w) @ _vectors_with_previous(_vector_chunks(v_c, w))
    return on_tokens @ v_t + local.flatten(2, 3)[:, :, :n_chars]


def _vector_chunks(x: torch.Tensor, size: int) -> torch.Tensor:
    """(B, H, C, D) -> (B, H, ceil(C / size), size, D)."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))


def _vectors_with_previous(chunks: torch.Tensor) -> torch.Tensor:
    """(B, H, n, W, D) -> (B, H, n, 2 W, D)."""
    return torch.cat([F.pad(chunks, (0, 0, 0, 0, 1, -1)), chunks], dim=-2)
