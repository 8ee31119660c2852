"""What a generation keeps between passes: keys and values of tokens, and those of the chars of the block at hand.

B sequences, T and C slots of each in a pass, N = T + C, W char slots, S token slots, K = W + S + 1, H heads, D head
width, F arrays of `Slots`. A sequence's keys lie in one buffer: chars in the order in which they were fed, token j in
slot W + j, and a last slot for what padding writes. What is left of earlier passes behind the counts that `aim` is told
is not seen: so chars are dropped, and drafts taken back. No shape depends on what the device computes.
"""

from dataclasses import fields, replace

import torch

from data_pipeline.layout import NO_DOCUMENT, Slots
from tidal_dist.model.transformer import KeysValues

_LEAST_TOKENS = 64  # room for tokens to begin with
ARRAYS = [f.name for f in fields(Slots) if f.name != "stream"]


class Cache:
    """The `Past` of a batch of sequences.

    Attributes:
        char_capacity: W. row_capacity, token_capacity: sequences, and S, that there is room for.
    """

    def __init__(self, char_capacity: int, skips_empty_layers: bool = True) -> None:
        self.char_capacity, self.row_capacity, self.token_capacity = _aligned(char_capacity), 0, 0
        self.skips_empty_layers = skips_empty_layers
        self._rows, self._length = slice(0, 0), 0
        self._counts = self._targets = torch.empty(0)
        self._buffers: dict[str, torch.Tensor] = {}  # each (B, K, ...)

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for so many sequences, and tokens of each; for more tokens at once, so that it is seldom done."""
        if rows <= self.row_capacity and tokens <= self.token_capacity:
            return
        self.row_capacity = max(rows, self.row_capacity)
        if tokens > self.token_capacity:
            self.token_capacity = _aligned(max(tokens, self.token_capacity * 3 // 2, _LEAST_TOKENS))
        for name, old in self._buffers.items():
            new = old.new_zeros(self.row_capacity, self._keys, *old.shape[2:])
            new[: len(old), : old.shape[1] - 1] = old[:, :-1]
            self._buffers[name] = new

    @property
    def _keys(self) -> int:
        return self.char_capacity + self.token_capacity + 1

    def move(self, source: int, target: int) -> None:
        """Put a sequence in the place of another, which is done."""
        for buffer in self._buffers.values():
            buffer[target] = buffer[source]

    def aim(self, rows: slice, counts: torch.Tensor, longest: int) -> None:
        """Say what the next pass is about.

        Args:
            rows: the sequences. counts: (2, B), how many tokens and chars of each are kept from earlier passes.
            longest: tokens of the longest of them after the pass; keys beyond are left out.
        """
        self._rows, self._counts = rows, counts
        self._length = self.char_capacity + _aligned(longest)

    def extend_slots(self, tokens: Slots, chars: Slots) -> tuple[Slots, Slots]:
        """Take up this pass's slots; the slots of all keys, tokens and chars, cached and new."""
        places = torch.arange(chars.ids.shape[1], device=chars.ids.device)
        at = torch.cat([self.char_capacity + tokens.index, self._counts[1][:, None] + places], dim=1)
        document = torch.cat([tokens.document, chars.document], dim=1)
        at = torch.where(document != NO_DOCUMENT, at, self._keys - 1)
        rows = torch.arange(self._rows.start, self._rows.stop, device=at.device)
        self._targets = at + rows[:, None] * self._keys
        arrays = [torch.cat([getattr(tokens, n), getattr(chars, n)], dim=1) for n in ARRAYS]
        kept = self._written("slots", torch.stack(arrays, dim=-1))
        counts = self._counts + torch.stack([(s.document != NO_DOCUMENT).sum(dim=1) for s in (tokens, chars)])
        token_keys = Slots("token", *kept[:, self.char_capacity :].unbind(-1))
        char_keys = Slots("char", *kept[:, : self.char_capacity].unbind(-1))
        return _first(token_keys, counts[0]), _first(char_keys, counts[1])

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> KeysValues:
        """Take up a layer's keys and values (B, H, N, D) of this pass; those of all keys, chars before tokens."""
        keys, values = (
            self._written(f"{name}{layer}", new.transpose(1, 2)).transpose(1, 2) for name, new in (("k", k), ("v", v))
        )
        return keys, values

    def extend_handoff(self, state: torch.Tensor, chars: Slots) -> torch.Tensor:
        """Take up token states (B, T, width) of this pass; for each char the state of its last context token."""
        kept = self._written("handoff", state)
        slot = (self.char_capacity + chars.start_pos - 1).clamp_min(0)
        return kept.gather(1, slot[..., None].expand(-1, -1, kept.shape[-1]))

    def _written(self, name: str, new: torch.Tensor) -> torch.Tensor:
        """Write what is new, (B, N or T, ...), to where this pass's slots lie; all that is kept, (B, keys, ...)."""
        if name not in self._buffers:
            self._buffers[name] = new.new_zeros(self.row_capacity, self._keys, *new.shape[2:])
        buffer = self._buffers[name]
        buffer.flatten(0, 1).index_copy_(0, self._targets[:, : new.shape[1]].flatten(), new.flatten(0, 1))
        return buffer[self._rows, : self._length]


def _aligned(slots: int) -> int:
    """So many slots or a few more: kernels on GPUs read masks in pieces of 16 bytes."""
    return -(-slots // 8) * 8


def _first(keys: Slots, counts: torch.Tensor) -> Slots:
    """Keys (B, n) of which the first `counts` (B,) of each sequence are to be seen."""
    places = torch.arange(keys.ids.shape[1], device=counts.device)
    return replace(keys, document=(places < counts[:, None]).to(keys.document.dtype))
