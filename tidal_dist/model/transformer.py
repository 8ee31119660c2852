"""The TidalTransformer: tokens pass all layers, chars the top ones, in one forward pass.

With a draft head chars also enter further up: what the layers from there on say is a draft of what all will say.

B rows, T token slots, C char slots, N = T + C, H heads, D head width, V chars and specials.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from data_pipeline.layout import NO_PLACE, Slots, place_count
from data_pipeline.tokenizer import OUTPUT_VOCABULARY
from tidal_dist.config import ModelConfig
from tidal_dist.model.attention import (
    Kernel,
    Prepared,
    Scoring,
    attend,
    attend_cached,
    attend_with_drafts,
    cached_bias,
    prepare_attention,
)
from tidal_dist.model.nats import logits_or_nats, nats
from tidal_dist.model.positions import chars_again, rope_angles, rotate

KeysValues = tuple[torch.Tensor, torch.Tensor]
Checkpoint = Callable[..., torch.Tensor]


class Past(Protocol):
    """What was computed in earlier passes of a generation; keys come with their slots."""

    skips_empty_layers: bool  # layers that have nothing to do need not be called
    is_drafted: bool  # passes of the draft head follow, which need its handoff of the tokens

    def extend_slots(self) -> tuple[Slots, Slots, Slots, Slots]:
        """Take up this pass's slots; its tokens and chars, and the tokens and chars of all keys, cached and new."""

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> KeysValues:
        """Take up a layer's keys and values (B, H, N, D) of this pass; those of all keys, chars before tokens."""

    def extend_handoff(self, name: str, state: torch.Tensor, chars: Slots) -> torch.Tensor:
        """Take up token states (B, T, width) of this pass; for each char the state of its last context token.

        Args:
            name: of what the states are for; each keeps its own.
        """


class Linear(nn.Linear):
    """A linear map without bias whose initial weights keep the variance, times `gain`."""

    def __init__(self, inputs: int, outputs: int, gain: float = 1.0):
        self.gain = gain
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Normal with standard deviation gain / sqrt(inputs)."""
        _draw(self.weight, self.gain * self.in_features**-0.5)


class Embedding(nn.Embedding):
    """An embedding whose rows start with norm 1: the model multiplies by sqrt(width)."""

    def reset_parameters(self) -> None:
        """Normal with standard deviation 1 / sqrt(width)."""
        _draw(self.weight, self.embedding_dim**-0.5)


def _draw(weight: torch.Tensor, deviation: float) -> None:
    # Where there is no memory there is nothing to draw, and PyTorch would import its compiler for it: two seconds.
    if not weight.is_meta:
        nn.init.normal_(weight, std=deviation)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020) or GELU."""

    def __init__(self, config: ModelConfig, gain: float):
        super().__init__()
        self.gated = config.mlp == "swiglu"
        self.up = Linear(config.width, config.hidden_width * (2 if self.gated else 1))
        self.down = Linear(config.hidden_width, config.width, gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, width) -> (B, N, width)."""
        hidden = self.up(x)
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            return self.down(F.silu(gate) * value)
        return self.down(F.gelu(hidden))


class Layer(nn.Module):
    """One pre-norm decoder layer over a token part and a char part."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.index = index
        self.n_heads = config.n_heads
        self.is_last = index == config.n_layers - 1
        self.dropout = config.dropout
        gain = (2 * config.n_layers) ** -0.5
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.query = Linear(config.width, config.width)
        self.key_value = Linear(config.width, 2 * config.width)
        self.out = Linear(config.width, config.width, gain)
        self.mlp_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.mlp = FeedForward(config, gain)

    def forward(
        self,
        x: torch.Tensor,
        n_tokens: int,
        prepared: Prepared | torch.Tensor,
        angles: KeysValues | None,
        past: Past | None,
        n_drafted: int = 0,
    ) -> torch.Tensor:
        """(B, N, width) -> (B, N, width); from the last layer only the chars, since nothing reads its tokens.

        The last `n_drafted` slots are the chars once more, as the draft head knows them.
        """
        n_asking = x.shape[1] - n_tokens if self.is_last else x.shape[1]
        q, k, v = self.project(x, n_asking, angles)
        return self.finish(x[:, -n_asking:], self._attend(q, k, v, prepared, past, n_drafted))

    def project(
        self, x: torch.Tensor, n_asking: int, angles: KeysValues | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Before attention: (B, N, width) -> queries of the last slots (B, H, n_asking, D), keys and values."""
        h = self.attention_norm(x)
        keys, values = self.key_value(h).chunk(2, dim=-1)
        return *self.queries_and_keys(self.query(h[:, -n_asking:]), keys, angles), self._heads(values)

    def finish(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Behind attention: x (B, Q, width) that asked, y (B, H, Q, D) that it got -> (B, Q, width)."""
        x = x + self._drop(self.out(y.transpose(1, 2).flatten(2)))
        return x + self._drop(self.mlp(self.mlp_norm(x)))

    def queries_and_keys(self, queries: torch.Tensor, keys: torch.Tensor, angles: KeysValues | None) -> KeysValues:
        """The last Q of N slots ask: (B, Q, width) and (B, N, width) -> (B, H, Q, D) and (B, H, N, D), rotated."""
        q, k = self._heads(queries), self._heads(keys)
        if angles is None:
            return q, k
        (cos, sin), n, first = angles, k.shape[2], k.shape[2] - q.shape[2]
        return rotate(q, (cos[:, :, first:n], sin[:, :, first:n])), rotate(k, (cos[:, :, :n], sin[:, :, :n]))

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prepared: Prepared | torch.Tensor,
        past: Past | None,
        n_drafted: int,
    ) -> torch.Tensor:
        if past is None:
            assert not isinstance(prepared, torch.Tensor)
            return attend_with_drafts(q, k, v, prepared, n_drafted) if n_drafted else attend(q, k, v, prepared)
        assert isinstance(prepared, torch.Tensor)
        return attend_cached(q, past.extend(self.index, k, v), prepared, k.shape[2] - q.shape[2])

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, width) -> (B, H, N, D)."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class TidalTransformer(nn.Module):
    """The model. `checkpoint(function, x)` runs every k-th layer, the first among them, and keeps only its input."""

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        max_block_bytes: int,
        checkpoint: Checkpoint | None = None,
        checkpoint_every_layers: int = 1,
        attention: Kernel = "auto",
    ):
        super().__init__()
        self.config = config
        self.attention = attention
        # The only block of a plain decoder is the document.
        self.longest_run = max_block_bytes + 1 if config.writes == "blocks" else None
        self.checkpoint = checkpoint
        self.checkpoint_every_layers = checkpoint_every_layers
        self.embedding = Embedding(vocab_size, config.width)
        if config.places:
            self.place_embedding = Embedding(place_count(max_block_bytes, config.place_shift), config.width)
        if config.has_handoff:
            self.handoff_norm = nn.RMSNorm(config.width, eps=1e-6)
            self.handoff = Linear(config.width, config.width)
        if config.draft_layers is not None:
            self.draft_handoff_norm = nn.RMSNorm(config.width, eps=1e-6)
            self.draft_handoff = Linear(config.width, config.width)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.output = Linear(config.width, vocab_size if config.writes == "tokens" else OUTPUT_VOCABULARY)

    def forward(
        self, tokens: Slots, chars: Slots, labels: torch.Tensor | None = None, past: Past | None = None
    ) -> torch.Tensor:
        """Logits of the chars (B, C, V), or with labels (B, C) the sum of their cross-entropy in nats.

        In training its gradient is also that of the draft head's: there the chars enter once more, further up.
        """
        config = self.config
        n_tokens, n_drafted = tokens.ids.shape[1], 0
        x = self._embed(tokens)
        prepared, angles = self.prepare(tokens, chars, x.dtype, past)
        trains_drafts = self.training and labels is not None
        for i, layer in enumerate(self.layers):
            if i == config.n_layers - config.char_depth:
                entering = embedded = self._embed(chars)
                if config.has_handoff:
                    entering = embedded + self._hand_off("handoff", x, tokens, chars, past)
                x = torch.cat([x, entering], dim=1)
            if i == config.draft_entry and (trains_drafts or (past is not None and past.is_drafted)):
                handed = self._hand_off("draft_handoff", x[:, :n_tokens], tokens, chars, past)
                if trains_drafts:
                    x, n_drafted = torch.cat([x, embedded + handed], dim=1), chars.ids.shape[1]
                    angles = angles and chars_again(angles, n_tokens)
            if x.shape[1] or past is None or not past.skips_empty_layers:
                x = self._run(i, layer, x, n_tokens, prepared, angles, past, n_drafted)
        hidden = self.norm(x)
        if n_drafted and labels is not None:
            return self._nats_with_drafts(hidden, labels)
        return logits_or_nats(self.output, hidden, labels)

    def _nats_with_drafts(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The nats of the chars, with the gradient of those of the drafts too: normed states (B, 2 C, width)."""
        chars, drafts = nats(self.output, hidden.unflatten(1, (2, -1)).transpose(0, 1), labels)
        return chars + self.config.draft_weight * (drafts - drafts.detach())

    def draft(self, tokens: Slots, chars: Slots, past: Past) -> torch.Tensor:
        """Logits (B, C, V) by the draft head; all tokens were in earlier passes, so these are none, (B, 0)."""
        x = self._embed(tokens)
        prepared, angles = self.prepare(tokens, chars, x.dtype, past)
        x = self._embed(chars) + self._hand_off("draft_handoff", x, tokens, chars, past)
        for layer in list(self.layers)[self.config.draft_entry :]:
            x = layer(x, 0, prepared, angles, past)
        return self.output(self.norm(x))

    def _run(self, index: int, layer: nn.Module, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if self.checkpoint is not None and self.training and index % self.checkpoint_every_layers == 0:
            return self.checkpoint(lambda inputs: layer(inputs, *arguments), x)
        return layer(x, *arguments)

    def _embed(self, slots: Slots) -> torch.Tensor:
        """(B, slots, width): ids and places, scaled by sqrt(width)."""
        x = self.embedding(slots.ids)
        if self.config.places:
            has_place = (slots.place != NO_PLACE)[..., None]
            x = x + self.place_embedding(slots.place) * has_place
        x = x * self.config.width**0.5
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x

    def prepare(
        self, tokens: Slots, chars: Slots, dtype: torch.dtype, past: Past | None
    ) -> tuple[Prepared | torch.Tensor, KeysValues | None]:
        """What attention needs (of a decoding pass `cached_bias`) and rotary angles, once for all layers."""
        config = self.config
        alibi_heads = config.n_heads if config.encoding == "alibi" else None
        scoring = Scoring(config.token_attention, alibi_heads, dtype, config.width // config.n_heads)
        prepared: Prepared | torch.Tensor
        if past is None:
            longest_run = self.longest_run or chars.ids.shape[1]
            prepared = prepare_attention(tokens, chars, longest_run, scoring, self.attention)
        else:
            prepared = cached_bias(*past.extend_slots(), scoring)
        if config.encoding != "rope":
            return prepared, None
        position = torch.cat([tokens.position, chars.position], dim=1)
        return prepared, rope_angles(position, config.width // config.n_heads, config.rope_base, dtype)

    def _hand_off(self, name: str, x: torch.Tensor, tokens: Slots, chars: Slots, past: Past | None) -> torch.Tensor:
        """For each char the state of the last token before its block, projected by the module `name`, (B, C, width)."""
        state = self.get_submodule(name)(self.get_submodule(f"{name}_norm")(x))
        if past is not None:
            return past.extend_handoff(name, state, chars)
        return state.gather(1, context_slots(tokens, chars)[..., None].expand(-1, -1, state.shape[-1]))


def context_slots(tokens: Slots, chars: Slots) -> torch.Tensor:
    """For each char (B, C) the slot, in its row, of the last token before its block; 0 for padding."""
    slot = torch.arange(tokens.ids.shape[1], device=tokens.ids.device).expand_as(tokens.ids)
    starts = slot.new_zeros(len(slot), max(int(slot.shape[1]), 1) + 1)
    # Tokens of a document lie end to end: slot - index is the document's first slot.
    starts.scatter_(1, tokens.document, slot - tokens.index)
    return (starts.gather(1, chars.document) + chars.start_pos - 1).clamp_min(0)
