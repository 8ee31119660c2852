"""The one attention function of the two streams.

B rows, T token slots, C char slots, N = T + C, Q queries, K keys, H heads, D head width.

Tokens attend to tokens; chars attend to tokens and, within their block, to chars. Three kernels compute the same:
`split` (split.py), parts merged by their log-sum-exps, on every device; `flex` (flex.py), PyTorch's FlexAttention, on
GPUs; `dense`, every query against every key of the row, with which the others are compared.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
import torch.nn.functional as F

from data_pipeline.layout import Slots
from tidal_dist.model import flex
from tidal_dist.model.scores import Scoring, bias, bias_of, visible
from tidal_dist.model.split import split

Kernel = Literal["auto", "flex", "split", "dense"]


class Prepared(Protocol):
    """What a kernel needs to know of the rows of a pass, once for all layers.

    Attributes:
        kernel: the kernel's name. n_tokens: T.
    """

    @property
    def kernel(self) -> str:
        """Its name."""

    @property
    def n_tokens(self) -> int:
        """T."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `attend`."""

    def table(self, queries: slice) -> torch.Tensor:
        """Biases of these of the N slots to all slots, (B, 1 or H, Q, N) on the CPU; -inf where no score is made."""

    def computed_pairs(self) -> int:
        """Pairs of a query and a key that are computed in a layer that all slots pass, over all rows."""


def prepare_attention(
    tokens: Slots, chars: Slots, longest_run: int, scoring: Scoring, kernel: Kernel = "auto"
) -> Prepared:
    """All that depends on the rows alone: tokens (B, T), chars (B, C).

    Args:
        longest_run: W, char slots of the longest block, `<bob>` included.
        kernel: auto: flex on a GPU, split elsewhere. One that the device or the model's heads do not have is replaced
            by split, and named once.
    """
    used = usable_kernel(kernel, tokens.ids.device.type, scoring)
    return _PREPARE[used](tokens, chars, longest_run, scoring)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prepared: Prepared) -> torch.Tensor:
    """Slots over slots: q (B, H, Q, D), k and v (B, H, K, D) -> (B, H, Q, D).

    K is N, tokens before chars, or T where no chars pass; Q is K, or C where chars alone ask.
    """
    return prepared.attend(q, k, v)


def attend_with_drafts(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prepared: Prepared, n_drafted: int
) -> torch.Tensor:
    """As `attend` where the C chars stand a second time behind all others, as a draft head knows them.

    These see the tokens and each other, as the first ones do: q (B, H, Q, D), k and v (B, H, T + 2 C, D) ->
    (B, H, Q, D); Q is T + 2 C, or 2 C where chars alone ask.
    """
    own_k, own_v = (torch.cat([x[:, :, : prepared.n_tokens], x[:, :, -n_drafted:]], dim=2) for x in (k, v))
    found = (
        attend(q[:, :, :-n_drafted], k[:, :, :-n_drafted], v[:, :, :-n_drafted], prepared),
        attend(q[:, :, -n_drafted:], own_k, own_v, prepared),
    )
    # Heads of a slot side by side, as the layer's next matrix takes them.
    return torch.cat([y.transpose(1, 2) for y in found], dim=1).transpose(1, 2)


def usable_kernel(kernel: Kernel, device_type: str, scoring: Scoring) -> str:
    """The kernel that is used where `kernel` is asked for; says so, once, where it is another."""
    if kernel not in ("auto", "flex"):
        return kernel
    reason = flex.refusal(device_type, scoring)
    if reason is None:
        return "flex"
    if kernel == "flex" or device_type == "cuda":
        _say_once(f"attention: flex cannot be used: {reason}; split is used instead")
    return "split"


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Dense:
    """Every query against every key. Attributes: token: (B, 1 or H, T, T). char: (B, 1 or H, C, N)."""

    token: torch.Tensor
    char: torch.Tensor
    kernel: str = "dense"

    @property
    def n_tokens(self) -> int:
        """T."""
        return self.token.shape[3]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `attend`."""
        outputs, first, n = [], k.shape[2] - q.shape[2], self.n_tokens
        if first == 0:
            on_tokens = k[:, :, :n], v[:, :, :n]
            outputs.append(F.scaled_dot_product_attention(q[:, :, :n], *on_tokens, attn_mask=self.token))
        if k.shape[2] > n:
            outputs.append(F.scaled_dot_product_attention(q[:, :, n - first :], k, v, attn_mask=self.char))
        return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]

    def table(self, queries: slice) -> torch.Tensor:
        """See `Prepared`."""
        never = self.token.new_full((*self.token.shape[:3], self.char.shape[2]), -torch.inf)
        return torch.cat([torch.cat([self.token, never], dim=3), self.char], dim=2)[:, :, queries].double().cpu()

    def computed_pairs(self) -> int:
        """See `Prepared`."""
        return sum(b.shape[0] * b.shape[2] * b.shape[3] for b in (self.token, self.char))


def _dense(tokens: Slots, chars: Slots, _longest_run: int, scoring: Scoring) -> Dense:
    of_chars = torch.cat([bias(chars, key, scoring) for key in (tokens, chars)], dim=-1)
    return Dense(bias(tokens, tokens, scoring), of_chars)


_PREPARE: dict[str, Callable[[Slots, Slots, int, Scoring], Prepared]] = {
    "split": split,
    "dense": _dense,
    "flex": flex.flex,
}


def cached_bias(tokens: Slots, chars: Slots, key_tokens: Slots, key_chars: Slots, scoring: Scoring) -> torch.Tensor:
    """Bias of a decoding pass, (B, 1 or H, T + C, K): tokens, then chars, on all cached chars, then all tokens.

    All slots hold tensors, or all numpy arrays.
    """
    asking, asked = [query for query in (tokens, chars) if query.ids.shape[1]], (key_chars, key_tokens)
    rows = [torch.cat([torch.as_tensor(visible(query, key, scoring)) for key in asked], dim=-1) for query in asking]
    sees = torch.cat(rows, dim=-2)
    if scoring.alibi_heads is not None:
        positions = [torch.cat([torch.as_tensor(s.position) for s in streams], dim=-1) for streams in (asking, asked)]
        tokens, key_tokens = (replace(s, position=p) for s, p in zip((tokens, key_tokens), positions, strict=True))
    return bias_of(sees, tokens, key_tokens, scoring)


def attend_cached(
    q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], cached_bias: torch.Tensor, first: int
) -> torch.Tensor:
    """The slots from `first` on over a cache: q (B, H, Q, D), keys and values (B, H, K, D) each -> (B, H, Q, D)."""
    if not q.shape[2]:  # a pass may feed no tokens: the layers below the chars then have nothing to do
        return q
    return F.scaled_dot_product_attention(q, *kv, attn_mask=cached_bias[:, :, first : first + q.shape[2]])
