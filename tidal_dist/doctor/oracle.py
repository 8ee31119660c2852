"""The truth to compare with: the model and its loss the plain way, one sample for each supervised block.

A sample is [<bos>, tokens of all earlier blocks, <bob>, the block's bytes reversed]. Nothing here knows of packing,
of rows, of two streams or of a cache, and nothing is imported but ids, settings and the tokeniser: what training and
generation compute is held against it.

n slots, of them t tokens (`<bos>` included); H heads, D head width.
"""

import math
from dataclasses import dataclass

import torch

from data_pipeline.tokenizer import BOB, BOS, EOB, EOS, OUTPUT_VOCABULARY, MixedTokenizer
from tidal_dist.config import ModelConfig

Weights = dict[str, torch.Tensor]
NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class Document:
    """Blocks of a prompt, which is not supervised, and of the text after it; `ends` where a document ends."""

    prompt: tuple[str, ...]
    text: tuple[str, ...]
    ends: bool = True


@dataclass(frozen=True)
class Slot:
    """One slot of a sample. `place` is None where there is none; `c` is None for tokens."""

    id: int
    position: int
    place: int | None
    block: int
    c: int | None = None


@dataclass(frozen=True)
class Sample:
    """The context and one block to write, with the ids to predict from `<bob>` on."""

    tokens: list[Slot]
    chars: list[Slot]
    targets: list[int]


def samples(document: Document, tokenizer: MixedTokenizer, config: ModelConfig, place_shift: int = 0) -> list[Sample]:
    """One sample for each supervised block."""
    n_blocks = len(document.prompt) + len(document.text)
    return [sample(document, b, tokenizer, config, place_shift) for b in range(len(document.prompt), n_blocks)]


def sample(document: Document, b: int, tokenizer: MixedTokenizer, config: ModelConfig, place_shift: int = 0) -> Sample:
    """The sample for block `b` of a document, its prompt included in the count."""
    blocks = [*document.prompt, *document.text]
    context = [Slot(BOS, position=0, place=None, block=-1)]
    for earlier in range(b):
        context += _tokens_of_block(blocks[earlier], earlier, len(context), tokenizer, place_shift)
    written = list(reversed(blocks[b].encode()))
    sign = -1 if config.char_positions == "mirrored" else 1
    chars = [
        Slot(i, position=len(context) + sign * c, place=c + 1 + place_shift, block=b, c=c)
        for c, i in enumerate([BOB, *written])
    ]
    is_last = document.ends and b == len(blocks) - 1
    return Sample(context, chars, [*written, EOS if is_last else EOB])


def _tokens_of_block(block: str, b: int, start: int, tokenizer: MixedTokenizer, place_shift: int) -> list[Slot]:
    slots: list[Slot] = []
    bytes_left = len(block.encode())
    for i in tokenizer.encode_block(block):
        bytes_left -= len(tokenizer.token_bytes(i))
        slots.append(Slot(i, position=start + len(slots), place=bytes_left + 1 + place_shift, block=b))
    return slots


def loss(document: Document, tokenizer: MixedTokenizer, config: ModelConfig, weights: Weights) -> torch.Tensor:
    """Sum of the cross-entropy in nats over all supervised blocks of a document."""
    return sum_of_losses(samples(document, tokenizer, config), config, weights)


def sum_of_losses(made: list[Sample], config: ModelConfig, weights: Weights) -> torch.Tensor:
    """Sum of the cross-entropy in nats over samples."""
    total = torch.zeros((), dtype=torch.float64)
    for sample in made:
        log_p = logits(sample, config, weights).log_softmax(dim=-1)
        for row, target in enumerate(sample.targets):
            total = total - log_p[row, target]
    return total


def logits(sample: Sample, config: ModelConfig, weights: Weights) -> torch.Tensor:
    """Logits of a sample's chars."""
    x = _embed(sample.tokens, config, weights)
    slots = list(sample.tokens)
    for n in range(config.n_layers):
        if n == config.n_layers - config.char_depth:
            entering = _embed(sample.chars, config, weights)
            if config.has_handoff:
                last = _norm(x[len(sample.tokens) - 1], weights["handoff_norm.weight"])
                entering = entering + weights["handoff.weight"] @ last
            x = torch.cat([x, entering])
            slots = slots + sample.chars
        x = _layer(x, slots, n, config, weights)
    chars = _norm(x[len(sample.tokens) :], weights["norm.weight"])
    assert weights["output.weight"].shape[0] == OUTPUT_VOCABULARY
    return chars @ weights["output.weight"].T


def _embed(slots: list[Slot], config: ModelConfig, weights: Weights) -> torch.Tensor:
    rows = []
    for slot in slots:
        row = weights["embedding.weight"][slot.id]
        if config.places and slot.place is not None:
            row = row + weights["place_embedding.weight"][slot.place]
        rows.append(row * math.sqrt(config.width))
    return torch.stack(rows)


def _layer(x: torch.Tensor, slots: list[Slot], n: int, config: ModelConfig, weights: Weights) -> torch.Tensor:
    def weight(name: str) -> torch.Tensor:
        return weights[f"layers.{n}.{name}.weight"]

    h = _norm(x, weight("attention_norm"))
    queries, keys_values = h @ weight("query").T, h @ weight("key_value").T
    keys, values = keys_values[:, : config.width], keys_values[:, config.width :]
    visible = visible_slots(slots, config)
    positions = [slot.position for slot in slots]
    head_width = config.width // config.n_heads
    heads = []
    for head in range(config.n_heads):
        part = slice(head * head_width, (head + 1) * head_width)
        q, k = queries[:, part], keys[:, part]
        if config.encoding == "rope":
            q, k = _rope(q, positions, config.rope_base), _rope(k, positions, config.rope_base)
        scores = q @ k.T / math.sqrt(head_width)
        if config.encoding == "alibi":
            p = torch.tensor(positions, dtype=torch.float64)
            scores = scores - press_slope(head, config.n_heads) * (p[:, None] - p[None, :]).abs()
        heads.append(scores.masked_fill(~visible, -math.inf).softmax(dim=-1) @ values[:, part])
    x = x + torch.cat(heads, dim=-1) @ weight("out").T
    return x + _feed_forward(_norm(x, weight("mlp_norm")), weight("mlp.up"), weight("mlp.down"), config.mlp)


def visible_slots(slots: list[Slot], config: ModelConfig) -> torch.Tensor:
    """The rules of who sees whom, as a (n, n) table of queries and keys."""
    rows = []
    for q, query in enumerate(slots):
        row = []
        for k, key in enumerate(slots):
            if query.c is None:
                in_order = key.block <= query.block if config.token_attention == "block" else k <= q
                row.append(key.c is None and in_order)
            else:
                # The context of a sample is just what stands before the block; its chars are those of one block.
                row.append(key.c is None or key.c <= query.c)
        rows.append(row)
    return torch.tensor(rows)


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + NORM_EPSILON) * weight


def _feed_forward(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, kind: str) -> torch.Tensor:
    hidden = x @ up.T
    if kind == "swiglu":
        half = hidden.shape[-1] // 2
        gate = hidden[:, :half]
        return (gate * torch.sigmoid(gate) * hidden[:, half:]) @ down.T
    return (0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))) @ down.T


def _rope(x: torch.Tensor, positions: list[int], base: float) -> torch.Tensor:
    """Turn (x_i, x_{i + D/2}) of every slot by the angle position * base^(-2 i / D)."""
    half = x.shape[-1] // 2
    angles = torch.tensor([[p * base ** (-i / half) for i in range(half)] for p in positions], dtype=torch.float64)
    left, right = x[:, :half], x[:, half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


def press_slope(head: int, n_heads: int) -> float:
    """Slope of head 0, 1, ...: 2^(-8/H), 2^(-16/H), ...; what is more than a power of two fills in between."""
    power = 2 ** math.floor(math.log2(n_heads))
    if head < power:
        return 2 ** (-8 * (head + 1) / power)
    return 2 ** (-4 * (2 * (head - power) + 1) / power)
