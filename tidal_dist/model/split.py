"""Attention in parts: chars on tokens and chars on chars apart, merged by their log-sum-exps.

B rows, T token slots, C char slots, N = T + C, W char slots of the longest block, Q queries, K keys, H heads, D head
width.

A part is a call of a kernel on slices of queries, keys and values: nothing is copied. Chars attend to chars in groups,
each to its own slots and the W before it; all full groups of a row, windows that lie side by side, are one call. On a
CPU queries attend to tokens in chunks, each to the stretch of tokens from the first to the last that any of it sees,
and W is that of the rows; on other devices all attend to all tokens, since asking would wait for the device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from data_pipeline.layout import Slots
from tidal_dist.model import kernels
from tidal_dist.model.groups import CHUNK, group_size
from tidal_dist.model.scores import Scoring, bias, bias_of, visible

_CALL_PAIRS = 2048  # so many pairs of a query and a key cost about as much as a call


@dataclass(frozen=True)
class Part:
    """Queries and keys that attend in one call.

    Attributes:
        rows: of the batch. queries, keys: their slots among all N.
        bias: (rows, 1 or H, Q, K); of windows (windows, 1 or H, Q, K).
        windows: so many times the same, each as many slots further on as there are queries; then `rows` is one row.
        joins: an earlier part has the same queries.
    """

    rows: slice
    queries: slice
    keys: slice
    bias: torch.Tensor
    windows: int = 1
    joins: bool = False

    def asking(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """Its queries' view (rows or windows, H, Q, D) of x (B, H, n, D), which begins at slot `first`."""
        return self._view(x, self.queries, first, slice(None))

    def asked(self, x: torch.Tensor) -> torch.Tensor:
        """Its keys' view (rows or windows, H, K, D) of x (B, H, n, D)."""
        return self._view(x, self.keys, 0, slice(None))

    def add_to_keys(self, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add what its keys get, (rows or windows, H, K, D), to x (B, H, n, D)."""
        # Windows overlap; pieces no longer than their distance do not.
        n_keys = self.keys.stop - self.keys.start
        step = n_keys if self.windows == 1 else _length(self.queries)
        for start in range(0, n_keys, step):
            piece = slice(start, min(start + step, n_keys))
            self._view(x, self.keys, 0, piece).add_(gradient[:, :, piece])

    def _view(self, x: torch.Tensor, slots: slice, first: int, piece: slice) -> torch.Tensor:
        start, stop, _ = piece.indices(_length(slots))
        begin, length = slots.start - first + start, stop - start
        if self.windows == 1:
            return x[self.rows, :, begin : begin + length]
        step = _length(self.queries)
        row = x[self.rows.start, :, begin : begin + (self.windows - 1) * step + length]
        return row.unfold(1, length, step).permute(1, 0, 3, 2)


def _length(slots: slice) -> int:
    return int(slots.stop - slots.start)


@dataclass(frozen=True)
class Split:
    """The parts of one pass. Attributes: n_tokens: T. token_parts: of tokens. char_parts: of chars, in any layer."""

    n_rows: int
    n_tokens: int
    n_chars: int
    token_parts: list[Part]
    char_parts: list[Part]
    kernel: str = "split"

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `attention.attend`."""
        tokens_ask, chars_ask = q.shape[2] == k.shape[2], k.shape[2] > self.n_tokens
        parts = [*(self.token_parts if tokens_ask else ()), *(self.char_parts if chars_ask else ())]
        return _Merged.apply(q, k, v, parts, kernels.kernel_for(q))

    def table(self, queries: slice) -> torch.Tensor:
        """See `attention.Prepared`."""
        n, parts = self.n_tokens + self.n_chars, [*self.token_parts, *self.char_parts]
        first, end, _ = queries.indices(n)
        heads = max([part.bias.shape[1] for part in parts], default=1)
        table = torch.full((self.n_rows, heads, max(end - first, 0), n), -torch.inf, dtype=torch.float64)
        for part in parts:
            for window in range(part.windows):
                at = window * _length(part.queries)
                q, k = _shifted(part.queries, at), _shifted(part.keys, at)
                start, stop = max(q.start, first), min(q.stop, end)
                if start < stop:
                    its = part.bias[window : window + 1] if part.windows > 1 else part.bias
                    table[part.rows, :, start - first : stop - first, k] = its[:, :, start - q.start : stop - q.start]
        return table

    def computed_pairs(self) -> int:
        """See `attention.Prepared`."""
        return sum(p.bias.shape[0] * p.bias.shape[2] * p.bias.shape[3] for p in (*self.token_parts, *self.char_parts))


class _Merged(torch.autograd.Function):
    """Attention over all keys from the parts'; see kernels.py for the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, parts: list[Part], kernel: Any) -> Any:
        first = k.shape[2] - q.shape[2]
        out = _empty_like(q).zero_()
        log_sum = q.new_full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))[..., None]
        for part in parts:
            found, its_sum = kernel.forward(part.asking(q, first), part.asked(k), part.asked(v), part.bias)
            _take_up(part, part.asking(out, first), part.asking(log_sum, first), found, its_sum[..., None])
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.parts, ctx.kernel = parts, kernel
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, v, out, log_sum = ctx.saved_tensors
        first = k.shape[2] - q.shape[2]
        by_q, by_k, by_v = (_empty_like(x).zero_() for x in (q, k, v))
        for part in ctx.parts:
            asking = [part.asking(x, first) for x in (grad, q, out, log_sum)]
            found = ctx.kernel.backward(
                asking[0], asking[1], part.asked(k), part.asked(v), asking[2], asking[3][..., 0], part.bias
            )
            part.asking(by_q, first).add_(found[0])
            part.add_to_keys(by_k, found[1])
            part.add_to_keys(by_v, found[2])
        return by_q, by_k, by_v, None, None


def _take_up(part: Part, out: torch.Tensor, log_sum: torch.Tensor, found: torch.Tensor, its_sum: torch.Tensor) -> None:
    """Merge what a part found into output (.., Q, D) and log-sum-exp (.., Q, 1) of its queries."""
    if not part.joins:
        out.copy_(found)
        log_sum.copy_(its_sum)
        return
    total = torch.logaddexp(log_sum, its_sum)
    out.copy_(out * (log_sum - total).exp() + found * (its_sum - total).exp())
    log_sum.copy_(total)


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    """As x (B, H, n, D), heads of a slot side by side, as the layer's matrices make and take them."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def split(tokens: Slots, chars: Slots, longest_run: int, scoring: Scoring) -> Split:
    """The parts of one pass over whole rows: tokens (B, T), chars (B, C).

    Args:
        longest_run: W, char slots of the longest block, `<bob>` included.
    """
    (n_rows, n_tokens), n_chars = tokens.ids.shape, chars.ids.shape[1]
    token_parts = list(_on_tokens(tokens, tokens, 0, scoring))
    if n_chars <= CHUNK:
        return Split(n_rows, n_tokens, n_chars, token_parts, list(_on_all(tokens, chars, scoring)))
    if asks_rows(chars.ids.device):
        longest_run = min(longest_run, int(chars.index.max()) + 1)
    on_tokens = list(_on_tokens(chars, tokens, n_tokens, scoring))
    on_chars = list(_on_chars(chars, n_tokens, longest_run, scoring))
    return Split(n_rows, n_tokens, n_chars, token_parts, [*on_tokens, *on_chars])


def _on_tokens(query: Slots, tokens: Slots, first: int, scoring: Scoring) -> Iterator[Part]:
    """Parts of slots that attend to tokens. first: the queries' first slot among all."""
    rows, (light_query, light_tokens) = slice(0, query.ids.shape[0]), map(_light, (query, tokens))
    for chunk in _chunks(query):
        asking = _cut(query, slice(None), chunk)
        sees = _sees(_cut(light_query, slice(None), chunk), light_tokens, scoring)
        for some, keys in _stretches(sees):
            part = bias_of(sees[some, :, keys], _cut(asking, some), _cut(tokens, some, keys), scoring)
            yield Part(rows if some == slice(None) else some, _shifted(chunk, first), keys, part)


def _on_all(tokens: Slots, chars: Slots, scoring: Scoring) -> Iterator[Part]:
    """The one part of few chars: tokens from the first that any of them sees, and all chars."""
    (n_rows, n_tokens), n_chars = tokens.ids.shape, chars.ids.shape[1]
    if n_chars:
        sees = _sees(_light(chars), _light(tokens), scoring)
        start = min((keys.start for _, keys in _stretches(sees)), default=n_tokens)
        keys = slice(start, n_tokens)
        on_tokens = bias_of(sees[:, :, keys], chars, _cut(tokens, slice(None), keys), scoring)
        joined = torch.cat([on_tokens, bias(chars, chars, scoring)], dim=-1)
        everything = slice(n_tokens, n_tokens + n_chars)
        yield Part(slice(0, n_rows), everything, slice(start, n_tokens + n_chars), joined)


def _on_chars(chars: Slots, n_tokens: int, longest_run: int, scoring: Scoring) -> Iterator[Part]:
    """Parts of chars that attend to chars: the first group and the rest behind the full ones in all rows at once."""
    n_rows, n_chars = chars.ids.shape
    size = group_size(longest_run)
    full = n_chars // size
    for start, stop in ((0, min(size, n_chars)), (max(full, 1) * size, n_chars)):
        if start < stop:
            queries, keys = slice(start, stop), slice(max(start - longest_run, 0), stop)
            part = bias(_cut(chars, slice(None), queries), _cut(chars, slice(None), keys), scoring)
            shifted = _shifted(queries, n_tokens), _shifted(keys, n_tokens)
            yield Part(slice(0, n_rows), *shifted, part, joins=True)
    for row in range(n_rows) if full > 1 else ():
        queries, keys = slice(size, 2 * size), slice(size - longest_run, 2 * size)
        asking, asked = (_windows(chars, row, slots, full - 1, size) for slots in (queries, keys))
        shifted = _shifted(queries, n_tokens), _shifted(keys, n_tokens)
        yield Part(slice(row, row + 1), *shifted, bias(asking, asked, scoring), full - 1, joins=True)


def _windows(chars: Slots, row: int, slots: slice, count: int, step: int) -> Slots:
    """Of one row these slots and, `count` in all, those each `step` further on: (count, slots)."""
    stretch = slice(slots.start, slots.stop + (count - 1) * step)
    return chars.map(lambda array: array[row, stretch].unfold(0, _length(slots), step))


def asks_rows(device: torch.device) -> bool:
    """Whether the parts follow what the rows' queries see; elsewhere asking would wait for the device."""
    return device.type == "cpu"


def _chunks(query: Slots) -> list[slice]:
    """Queries that attend together."""
    n = query.ids.shape[1]
    size = CHUNK if asks_rows(query.ids.device) else max(n, 1)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _light(slots: Slots) -> Slots:
    """Slots to ask what they see: numpy takes a third of torch's time for it, which is more than that of attention
    where rows hold many documents."""
    return slots.map(lambda array: array.int().numpy()) if asks_rows(slots.ids.device) else slots


def _sees(query: Slots, tokens: Slots, scoring: Scoring) -> torch.Tensor:
    """Which tokens the queries see, (B, Q, T) bool, by slots as `_light` makes them."""
    return torch.as_tensor(visible(query, tokens, scoring))


def _stretches(sees: torch.Tensor) -> list[tuple[slice, slice]]:
    """Rows, and the keys from the first to the last that their queries see; sees: (B, Q, K)."""
    n_rows, n_queries, n_keys = sees.shape
    if not asks_rows(sees.device):
        return [(slice(None), slice(0, n_keys))]
    of_rows = []
    seen: Any = sees.numpy().any(axis=1)
    for row, any_sees in enumerate(seen):
        found = any_sees.nonzero()[0]
        if len(found):
            of_rows.append((slice(row, row + 1), slice(int(found[0]), int(found[-1]) + 1)))
    if not of_rows:
        return []
    together = slice(min(k.start for _, k in of_rows), max(k.stop for _, k in of_rows))
    in_vain = n_rows * _length(together) - sum(_length(keys) for _, keys in of_rows)
    if in_vain * n_queries <= (len(of_rows) - 1) * _CALL_PAIRS:
        return [(slice(None), together)]
    return of_rows


def _cut(slots: Slots, rows: slice, columns: slice = slice(None)) -> Slots:
    return slots.map(lambda array: array[rows, columns])


def _shifted(slots: slice, by: int) -> slice:
    return slice(slots.start + by, slots.stop + by)
