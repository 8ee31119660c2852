"""What a generation keeps between passes: keys and values of tokens, and those of the chars of the block at hand.

B sequences, T and C slots of each in a pass, N = T + C, W char slots, S token slots, K = W + S + 1, H heads, D head
width, F arrays of `Slots`. A sequence's keys lie in one buffer: chars in the order in which they were fed, token j in
slot W + j, and a last slot for what padding writes. What is left of earlier passes behind the counts that `aim` is told
is not seen: so chars are dropped, and drafts taken back. No shape depends on what the device computes.
"""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from data_pipeline.layout import ARRAYS, NO_DOCUMENT, Slots
from tidal_dist.model.transformer import KeysValues

_LEAST_TOKENS = 64  # room for tokens to begin with
_KEPT_TOKENS = 4096  # so much room is kept, so that recorded passes can be used again
_WASTE = 4  # times as much room as is needed is given back
_DOCUMENT, _INDEX = ARRAYS.index("document"), ARRAYS.index("index")


def slots_of(stream: Literal["token", "char"], array: Any) -> Slots:
    """Slots whose arrays lie side by side on the last axis, (..., F), of a numpy array or a tensor."""
    parts = array.unbind(-1) if isinstance(array, torch.Tensor) else (array[..., i] for i in range(len(ARRAYS)))
    return Slots(stream, *parts)


def side_by_side(slots: Slots) -> np.ndarray:
    """The arrays of slots on a last axis, (..., F): what `slots_of` takes apart."""
    return np.stack([getattr(slots, name) for name in ARRAYS], axis=-1)


class Cache:
    """The `Past` of a batch of sequences.

    Attributes:
        char_capacity: W. row_capacity, token_capacity: sequences, and S, that there is room for.
        skips_empty_layers, is_drafted: as `Past` says.
    """

    def __init__(self, char_capacity: int, skips_empty_layers: bool = True, is_drafted: bool = False) -> None:
        self.char_capacity, self.row_capacity, self.token_capacity = _aligned(char_capacity), 0, 0
        self.skips_empty_layers, self.is_drafted = skips_empty_layers, is_drafted
        self._rows, self._length, self._n_tokens = slice(0, 0), 0, 0
        self._new = self._counts = self._targets = torch.empty(0)
        self._buffers: dict[str, torch.Tensor] = {}  # each (B, K, ...)
        self._views: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # of buffers: all slots in a row; keys of a pass

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for so many sequences, and tokens of each; for more tokens at once, so that it is seldom done."""
        if rows <= self.row_capacity and tokens <= self.token_capacity:
            return
        more = max(tokens, self.token_capacity * 3 // 2, _LEAST_TOKENS) if tokens > self.token_capacity else 0
        self._resize(max(rows, self.row_capacity), _aligned(more or self.token_capacity))

    def release(self, tokens: int) -> None:
        """Give room back where it is much more than the longest sequence's tokens: a longer one has left."""
        if self.token_capacity > max(_WASTE * tokens, _KEPT_TOKENS):
            self._resize(self.row_capacity, _aligned(max(tokens * 3 // 2, _LEAST_TOKENS)))

    def _resize(self, rows: int, tokens: int) -> None:
        self.row_capacity, self.token_capacity = rows, tokens
        self._views.clear()
        for name in list(self._buffers):
            old = self._buffers.pop(name)
            new = old.new_zeros(rows, self._keys, *old.shape[2:])
            kept = min(old.shape[1], self._keys) - 1
            new[: len(old), :kept] = old[:, :kept]
            self._buffers[name] = new

    @property
    def _keys(self) -> int:
        return self.char_capacity + self.token_capacity + 1

    def copy(self, source: int, target: int) -> None:
        """Put a sequence's keys and values in another's row too."""
        for buffer in self._buffers.values():
            buffer[target] = buffer[source]

    def targets(self, rows: slice, slots: np.ndarray, n_tokens: int, kept_chars: np.ndarray) -> np.ndarray:
        """Where a pass writes its slots, (B, N): row times K and slot. Call `reserve` before.

        Args:
            slots: (B, N, F), tokens first. kept_chars: (B,), chars of earlier passes that stay.
        """
        new_chars = kept_chars[:, None] + np.arange(slots.shape[1] - n_tokens)
        at = np.concatenate([self.char_capacity + slots[:, :n_tokens, _INDEX], new_chars], axis=1)
        at[slots[:, :, _DOCUMENT] == NO_DOCUMENT] = self._keys - 1
        return at + np.arange(rows.start, rows.stop)[:, None] * self._keys

    def aim(
        self,
        rows: slice,
        new: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        n_tokens: int,
        longest: int,
    ) -> None:
        """Say what the next pass is about.

        Args:
            rows: the sequences. new: slots (B, N, F), tokens first; targets (B, N), see `targets`; counts (2, B), how
                many tokens and chars of each are there after the pass. n_tokens: T.
            longest: tokens of the longest of them after the pass; keys beyond are left out.
        """
        length = self.char_capacity + _aligned(longest)
        if rows != self._rows or length != self._length:
            self._views.clear()
        self._rows, self._length, self._n_tokens = rows, length, n_tokens
        self._new, self._targets, self._counts = new

    def extend_slots(self) -> tuple[Slots, Slots, Slots, Slots]:
        """Take up this pass's slots; its tokens and chars, and the tokens and chars of all keys, cached and new.

        On a CPU as numpy arrays: masks are many operations on little, and numpy's cost a third of torch's.
        """
        return self.slots_with(self._written("slots", self._new))

    def slots_with(self, kept: torch.Tensor) -> tuple[Slots, Slots, Slots, Slots]:
        """As `extend_slots`, by all slots that are kept, (B, keys, F)."""
        kept, new, counts = map(_light, (kept, self._new, self._counts))
        tokens, chars = slots_of("token", new[:, : self._n_tokens]), slots_of("char", new[:, self._n_tokens :])
        token_keys = slots_of("token", kept[:, self.char_capacity :])
        char_keys = slots_of("char", kept[:, : self.char_capacity])
        return tokens, chars, _first(token_keys, counts[0]), _first(char_keys, counts[1])

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> KeysValues:
        """Take up a layer's keys and values (B, H, N, D) of this pass; those of all keys, chars before tokens."""
        keys, values = (
            self._written(f"{name}{layer}", new.transpose(1, 2)).transpose(1, 2) for name, new in (("k", k), ("v", v))
        )
        return keys, values

    def extend_handoff(self, name: str, state: torch.Tensor, chars: Slots) -> torch.Tensor:
        """Take up token states (B, T, width) of this pass; for each char the state of its last context token."""
        return self.handed_to(chars, self._written(name, state))

    def handed_to(self, chars: Slots, kept: torch.Tensor) -> torch.Tensor:
        """For each char the state of its last context token, by all states that are kept, (B, keys, width)."""
        slot = (self.char_capacity + chars.start_pos - 1).clamp_min(0)
        return kept.gather(1, slot[..., None].expand(-1, -1, kept.shape[-1]))

    def _written(self, name: str, new: torch.Tensor) -> torch.Tensor:
        """Write what is new, (B, N or T, ...), to where this pass's slots lie; all that is kept, (B, keys, ...)."""
        if name not in self._buffers:
            self._buffers[name] = new.new_zeros(self.row_capacity, self._keys, *new.shape[2:])
        kept = self.kept(name)
        if n := new.shape[1]:
            in_a_row, _ = self._views[name]
            in_a_row.index_copy_(0, self._targets[:, :n].flatten(), new.flatten(0, 1))
        return kept

    def kept(self, name: str) -> torch.Tensor:
        """What is kept under a name for the pass's sequences, (B, keys, ...): chars before tokens."""
        if name not in self._views:
            buffer = self._buffers[name]
            self._views[name] = buffer.flatten(0, 1), buffer[self._rows, : self._length]
        return self._views[name][1]


class Glance:
    """The `Past` of passes that leave nothing behind: their chars see a cache's tokens and each other.

    The cache is to be aimed at each of them, and is not written to.
    """

    skips_empty_layers, is_drafted = True, False

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def extend_slots(self) -> tuple[Slots, Slots, Slots, Slots]:
        """The pass's tokens and chars, and the tokens and chars of all keys: the cached ones and its own."""
        tokens, chars, token_keys, _ = self._cache.slots_with(self._cache.kept("slots"))
        return tokens, chars, token_keys, chars

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> KeysValues:
        """A layer's keys and values (B, H, C, D) of the pass, before those of the cached tokens."""
        first = self._cache.char_capacity
        keys, values = (
            torch.cat([new, self._cache.kept(f"{name}{layer}")[:, first:].transpose(1, 2)], dim=2)
            for name, new in (("k", k), ("v", v))
        )
        return keys, values

    def extend_handoff(self, name: str, state: torch.Tensor, chars: Slots) -> torch.Tensor:
        """For each char the state of its last context token, which an earlier pass took up; `state` has none."""
        del state
        return self._cache.handed_to(chars, self._cache.kept(name))


def _aligned(slots: int) -> int:
    """So many slots or a few more: kernels on GPUs read masks in pieces of 16 bytes."""
    return -(-slots // 8) * 8


def _light(array: torch.Tensor) -> Any:
    return array.numpy() if array.device.type == "cpu" else array


def _first(keys: Slots, counts: Any) -> Slots:
    """Keys (B, n) of which the first `counts` (B,) of each sequence are to be seen."""
    n = keys.ids.shape[1]
    places = np.arange(n) if isinstance(counts, np.ndarray) else torch.arange(n, device=counts.device)
    return replace(keys, document=(places < counts[:, None]) * 1)
