"""Attention by PyTorch's FlexAttention, which computes only blocks of pairs of which some are seen.

B rows, T token slots, C char slots, N = T + C, Q queries, K keys, H heads, D head width.

Tokens over tokens are one call, chars over all slots another: below the chars' layers, and in the last layer, where
only chars ask, one of the two is all there is. Which blocks are computed is counted from the layout's own predicate, in
stretches of queries, so that no table of all pairs is ever made; inside a block the kernel asks the same predicate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F

from data_pipeline.layout import Slots, may_see
from tidal_dist.model.positions import alibi_slopes
from tidal_dist.model.scores import Scoring, bias, visible

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask  # imports PyTorch's compiler: two seconds

BLOCK = 128  # queries and keys of a block: what the kernels like best
_STRETCH = 16 * BLOCK  # queries whose pairs are looked at together
_LEAST_HEAD_WIDTH = 16
_TYPES = (torch.float32, torch.float16, torch.bfloat16)

Stream = Literal["token", "char"]


def refusal(device_type: str, scoring: Scoring) -> str | None:
    """Why FlexAttention's kernels cannot be used, or None."""
    if device_type != "cuda":
        return f"it has no kernel for the backward pass on the device {device_type}"
    if scoring.dtype not in _TYPES:
        return f"its kernels do not take {scoring.dtype}"
    if scoring.head_width is not None and scoring.head_width < _LEAST_HEAD_WIDTH:
        return f"its kernels take heads of width {_LEAST_HEAD_WIDTH} or more, not {scoring.head_width}"
    return None


@dataclass(frozen=True)
class Asking:
    """The queries of one stream and what they may see.

    Attributes:
        blocks: the blocks that are computed. score: what is added to scores, or None.
        table: biases of these of its queries to all its keys, (B, 1 or H, Q, K).
    """

    blocks: BlockMask
    score: Callable[..., torch.Tensor] | None
    table: Callable[[slice], torch.Tensor]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """(B, H, Q, D) over (B, H, K, D)."""
        run = _function(is_compiled=q.device.type == "cuda")
        return cast(torch.Tensor, run(q, k, v, score_mod=self.score, block_mask=self.blocks))

    def biases(self, queries: slice) -> torch.Tensor:
        """As `table`, -inf in blocks that are not computed."""
        table, computed = self.table(queries), self.blocks.to_dense().bool()
        block = torch.arange(queries.start, queries.stop, device=table.device) // BLOCK
        computed = computed[:, :, block].repeat_interleave(BLOCK, dim=3)
        return table.masked_fill(~computed[..., : table.shape[3]], -torch.inf).double().cpu()

    def computed_pairs(self) -> int:
        """Pairs in the blocks that are computed; waits for the device."""
        return int(self.blocks.to_dense().sum()) * BLOCK**2


@dataclass(frozen=True)
class Flex:
    """Of one pass.

    Attributes:
        n_tokens: T. n_slots: N. tokens: over tokens. chars: over all slots; None where there are none.
    """

    n_tokens: int
    n_slots: int
    tokens: Asking
    chars: Asking | None
    kernel: str = "flex"

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `attention.attend`."""
        outputs, first, n = [], k.shape[2] - q.shape[2], self.n_tokens
        if first == 0:
            outputs.append(self.tokens.attend(q[:, :, :n], k[:, :, :n], v[:, :, :n]))
        if k.shape[2] > n and self.chars is not None:
            outputs.append(self.chars.attend(q[:, :, n - first :], k, v))
        return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]

    def table(self, queries: slice) -> torch.Tensor:
        """See `attention.Prepared`."""
        first, end, _ = queries.indices(self.n_slots)
        n = self.n_tokens
        of_tokens = self.tokens.biases(slice(min(first, n), min(end, n)))
        if self.chars is None:
            return of_tokens
        of_chars = self.chars.biases(slice(max(first - n, 0), max(end - n, 0)))
        return torch.cat([F.pad(of_tokens, (0, self.n_slots - n), value=-torch.inf), of_chars], dim=2)

    def computed_pairs(self) -> int:
        """See `attention.Prepared`."""
        return self.tokens.computed_pairs() + (self.chars.computed_pairs() if self.chars else 0)


@cache
def _function(is_compiled: bool) -> Callable[..., Any]:
    """FlexAttention, fused into one kernel only if compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return cast(Callable[..., Any], torch.compile(flex_attention) if is_compiled else flex_attention)


def flex(tokens: Slots, chars: Slots, _longest_run: int, scoring: Scoring) -> Flex:
    """Blocks and scores of one pass over whole rows: tokens (B, T), chars (B, C)."""
    n_tokens, n_chars = tokens.ids.shape[1], chars.ids.shape[1]
    of_chars = _asking(chars, [tokens, chars], scoring) if n_chars else None
    return Flex(n_tokens, n_tokens + n_chars, _asking(tokens, [tokens], scoring), of_chars)


def _asking(query: Slots, keys: list[Slots], scoring: Scoring) -> Asking:
    def table(queries: slice) -> torch.Tensor:
        asking = query.map(lambda array: array[:, queries])
        return torch.cat([bias(asking, key, scoring) for key in keys], dim=-1)

    return Asking(_blocks(query, keys, scoring), _score(query, keys, scoring), table)


def _blocks(query: Slots, keys: list[Slots], scoring: Scoring) -> BlockMask:
    """The blocks of queries and keys in which some pair is seen, and of these the ones in which all are."""
    from torch.nn.attention.flex_attention import BlockMask

    n_queries, n_keys = query.ids.shape[1], sum(key.ids.shape[1] for key in keys)
    some, every = [], []
    for start in range(0, n_queries, _STRETCH):
        asking = query.map(lambda a, s=start: a[:, s : s + _STRETCH])
        sees = torch.cat([visible(asking, key, scoring) for key in keys], dim=-1)
        # What lies behind the end is not seen: the kernel has to look at pairs of such a block one by one.
        sees = F.pad(sees, (0, -n_keys % BLOCK, 0, -sees.shape[1] % BLOCK))
        sees = sees.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
        some.append(sees.any(dim=4).any(dim=2))
        every.append(sees.all(dim=4).all(dim=2))
    seen, full = torch.cat(some, dim=1)[:, None], torch.cat(every, dim=1)[:, None]
    return BlockMask.from_kv_blocks(
        *_counted(seen & ~full),
        *_counted(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask(query, keys, scoring),
        seq_lengths=(n_queries, n_keys),
    )


def _counted(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row of blocks (B, 1, Q / 128, K / 128) how many are set, and the numbers of these before the others'."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), order.to(torch.int32)


def _mask(query: Slots, keys: list[Slots], scoring: Scoring) -> Callable[..., torch.Tensor]:
    """The predicate of the layout, asked for one pair of slots in one row."""
    everything = _joined(keys)
    n_tokens = keys[0].ids.shape[1]

    def of_stream(stream: Stream, row: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        asked = Slots(stream, **{name: array[row, k] for name, array in everything.items()})
        return cast(torch.Tensor, may_see(query.map(lambda array: array[row, q]), asked, scoring.token_attention))

    def mask(row: torch.Tensor, _head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        if len(keys) == 1:
            return of_stream("token", row, q, k)
        return torch.where(k < n_tokens, of_stream("token", row, q, k), of_stream("char", row, q, k))

    return mask


def _joined(keys: list[Slots]) -> dict[str, torch.Tensor]:
    """The arrays of all keys, (B, K)."""
    return {name: torch.cat([key.arrays()[name] for key in keys], dim=1) for name in keys[0].arrays()}


def _score(query: Slots, keys: list[Slots], scoring: Scoring) -> Callable[..., torch.Tensor] | None:
    """Alibi's bias, added to a score, or None."""
    if scoring.alibi_heads is None:
        return None
    # Made once: the kernel reads them pair by pair.
    slopes = alibi_slopes(scoring.alibi_heads, query.ids.device).float()
    of_queries, of_keys = query.position, torch.cat([key.position for key in keys], dim=1)

    def score(
        score: torch.Tensor, row: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        return score - slopes[head] * (of_queries[row, q] - of_keys[row, k]).abs()

    return score
