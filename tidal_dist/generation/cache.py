"""What a generation keeps between passes: keys and values of tokens, and those of the chars of the block at hand.

B sequences, H heads, D head width. Token j of a sequence is kept in slot j, char c of its block in slot c: the next
block's chars take the slots of the finished one's, and until they do, `may_see` hides what is left of those.
"""

import torch

from data_pipeline.layout import NO_DOCUMENT, Slots
from tidal_dist.model.transformer import KeysValues


class _Stream:
    """Slots of one stream and, by layer, their keys and values."""

    def __init__(self) -> None:
        self.slots: Slots | None = None
        self._kv: dict[int, KeysValues] = {}
        self._rows = self._columns = self._targets = torch.empty(0, dtype=torch.long)

    def extend_slots(self, new: Slots) -> Slots:
        """Write the new slots that are no padding, each at its index."""
        self._rows, self._columns = (new.document != NO_DOCUMENT).nonzero(as_tuple=True)
        self._targets = new.index[self._rows, self._columns]
        needed = int(self._targets.max()) + 1 if len(self._targets) else 0
        if self.slots is None:
            self.slots = new.map(lambda a: a.new_zeros(len(a), 0))
        missing = needed - self.slots.ids.shape[1]
        if missing > 0:
            self.slots = self.slots.map(lambda a: torch.cat([a, a.new_zeros(len(a), missing)], dim=1))
        for name, array in self.slots.arrays().items():
            array[self._rows, self._targets] = getattr(new, name)[self._rows, self._columns]
        return self.slots

    def extend(self, layer: int, new: KeysValues) -> KeysValues:
        """Write keys and values (B, H, N, D) where their slots were written."""
        assert self.slots is not None
        length = self.slots.ids.shape[1]
        if layer not in self._kv:
            self._kv[layer] = (new[0][:, :, :0], new[1][:, :, :0])
        self._kv[layer] = (
            self._write(self._kv[layer][0], new[0], length),
            self._write(self._kv[layer][1], new[1], length),
        )
        keys, values = self._kv[layer]
        return keys[:, :, :length], values[:, :, :length]

    def _write(self, kept: torch.Tensor, new: torch.Tensor, length: int) -> torch.Tensor:
        if kept.shape[2] < length:  # grow by half, so that the copies' cost stays linear
            grown = new.new_zeros(*kept.shape[:2], max(length, kept.shape[2] * 3 // 2), kept.shape[3])
            grown[:, :, : kept.shape[2]] = kept
            kept = grown
        kept[self._rows, :, self._targets] = new[self._rows, :, self._columns]
        return kept


class Cache:
    """The `Past` of a batch of sequences."""

    def __init__(self) -> None:
        self._tokens, self._chars = _Stream(), _Stream()
        self._handoff: torch.Tensor | None = None

    def extend_slots(self, tokens: Slots, chars: Slots) -> tuple[Slots, Slots]:
        """Take up this pass's slots; the slots of all keys, cached and new."""
        return self._tokens.extend_slots(tokens), self._chars.extend_slots(chars)

    def extend(self, layer: int, tokens: KeysValues, chars: KeysValues | None) -> tuple[KeysValues, KeysValues | None]:
        """Take up a layer's keys and values of this pass; those of all keys. Layers below the chars have none."""
        return self._tokens.extend(layer, tokens), None if chars is None else self._chars.extend(layer, chars)

    def extend_handoff(self, state: torch.Tensor, tokens: Slots, chars: Slots) -> torch.Tensor:
        """Keep each sequence's newest token state (B, T, width) and give it to its chars, (B, C, width)."""
        if self._handoff is None:
            self._handoff = state.new_zeros(len(chars.ids), state.shape[-1])
        counts = (tokens.document != NO_DOCUMENT).sum(dim=1)
        has_new = (counts > 0).nonzero()[:, 0]
        self._handoff[has_new] = state[has_new, counts[has_new] - 1]
        return self._handoff[:, None].expand(-1, chars.ids.shape[1], -1)
