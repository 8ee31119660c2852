"""The maps and scores of a pass, against the oracle's formulas and the layout's predicate."""

import copy
import math
from typing import Any

import pytest
import torch

from data_pipeline.layout import IGNORED, Slots, lay_out, may_see
from data_pipeline.pieces import piece_of_blocks
from data_pipeline.stream import batch_of_rows
from tests.builders import document_of, small_model, small_tokenizer
from tidal_dist.doctor import oracle
from tidal_dist.doctor.oracle import Slot
from tidal_dist.model.maps import LayerMap, attention_maps, char_scores, recorded_maps
from tidal_dist.model.transformer import TidalTransformer

TOKENIZER = small_tokenizer()
# More than four of the longest runs of chars, so that they attend in more than one group.
DOCUMENT = document_of("un café 潮水退 a 12345678 tides, 12345678 34 naïve", prompt="12 + 34 =")
SETTINGS: list[dict[str, Any]] = [
    {"encoding": "rope"},
    {"encoding": "alibi"},
    {"encoding": "none", "token_attention": "causal"},
    {"encoding": "rope", "char_layers": 1, "handoff": True, "token_attention": "causal"},
    {"encoding": "alibi", "char_layers": 2, "handoff": False, "char_positions": "forward"},
]


def row_of(model: TidalTransformer) -> tuple[Slots, Slots, torch.Tensor]:
    """The document as a batch of one row."""
    piece = piece_of_blocks([*DOCUMENT.prompt, *DOCUMENT.text], TOKENIZER, len(DOCUMENT.prompt))
    batch = batch_of_rows([lay_out(piece, TOKENIZER.byte_lengths, model.config.char_positions)])
    return batch.tokens, batch.chars, batch.labels


def expected(model: TidalTransformer, sample: oracle.Sample) -> list[tuple[torch.Tensor, list[Slot]]]:
    """Weights (H, n, n) of each layer over a sample's slots, and the slots, from the oracle's formulas."""
    config, weights = model.config, model.state_dict()
    x, slots, found = oracle._embed(sample.tokens, config, weights), list(sample.tokens), []
    for n in range(config.n_layers):
        if n == config.n_layers - config.char_depth:
            entering = oracle._embed(sample.chars, config, weights)
            if config.has_handoff:
                state = oracle._norm(x[-1], weights["handoff_norm.weight"])
                entering = entering + weights["handoff.weight"] @ state
            x, slots = torch.cat([x, entering]), slots + sample.chars
        found.append((softmax_of(x, slots, n, model), list(slots)))
        x = oracle._layer(x, slots, n, config, weights)
    return found


def softmax_of(x: torch.Tensor, slots: list[Slot], n: int, model: TidalTransformer) -> torch.Tensor:
    config, weights = model.config, model.state_dict()
    h = oracle._norm(x, weights[f"layers.{n}.attention_norm.weight"])
    queries = h @ weights[f"layers.{n}.query.weight"].T
    keys = h @ weights[f"layers.{n}.key_value.weight"][: config.width].T
    positions, d = [slot.position for slot in slots], config.width // config.n_heads
    heads = []
    for head in range(config.n_heads):
        q, k = (a[:, head * d : (head + 1) * d] for a in (queries, keys))
        if config.encoding == "rope":
            q, k = (oracle._rope(a, positions, config.rope_base) for a in (q, k))
        scores = q @ k.T / math.sqrt(d)
        if config.encoding == "alibi":
            p = torch.tensor(positions, dtype=torch.float64)
            scores = scores - oracle.press_slope(head, config.n_heads) * (p[:, None] - p).abs()
        heads.append(scores.masked_fill(~oracle.visible_slots(slots, config), -math.inf).softmax(dim=-1))
    return torch.stack(heads)


@pytest.mark.parametrize("settings", SETTINGS)
def test_weights_are_the_softmax_of_the_oracle(settings: dict[str, Any]) -> None:
    model = small_model(TOKENIZER, n_layers=3, **settings)
    tokens, chars, _ = row_of(model)
    maps = attention_maps(model, tokens, chars)
    for sample in oracle.samples(DOCUMENT, TOKENIZER, model.config):
        own = (chars.block[0] == sample.chars[0].block).nonzero()[:, 0]
        n_context = len(sample.tokens)
        for layer_map, (weights, slots) in zip(maps, expected(model, sample), strict=True):
            for head in range(layer_map.n_heads):
                if layer_map.has_token_queries:
                    of_tokens = layer_map.of_tokens(head)[:n_context, :n_context]
                    torch.testing.assert_close(of_tokens, weights[head, :n_context, :n_context])
                if layer_map.has_chars:
                    seen = torch.cat([torch.arange(n_context), layer_map.n_tokens + own])
                    of_chars = layer_map.of_chars(head)[own][:, seen]
                    torch.testing.assert_close(of_chars, weights[head, n_context : len(slots)])


@pytest.mark.parametrize("settings", SETTINGS)
def test_rows_sum_to_one_over_just_the_slots_that_may_be_seen(settings: dict[str, Any]) -> None:
    model = small_model(TOKENIZER, n_layers=3, **settings)
    tokens, chars, _ = row_of(model)
    kind = model.config.token_attention
    visible = {q.stream: [may_see(q.queries(), k.keys(), kind)[0] for k in (tokens, chars)] for q in (tokens, chars)}
    for layer_map in attention_maps(model, tokens, chars):
        for head in range(layer_map.n_heads):
            if layer_map.has_token_queries:
                check_rows(layer_map.of_tokens(head), visible["token"][0])
            if layer_map.has_chars:
                check_rows(layer_map.of_chars(head), torch.cat(visible["char"], dim=-1))


def check_rows(weights: torch.Tensor, visible: torch.Tensor) -> None:
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(len(weights), dtype=weights.dtype))
    assert torch.equal(weights > 0, visible)


def test_which_layers_have_which_queries() -> None:
    model = small_model(TOKENIZER, n_layers=3, char_layers=2)
    maps = attention_maps(model, *row_of(model)[:2])
    assert [m.layer for m in maps] == [0, 1, 2]
    assert [m.has_chars for m in maps] == [False, True, True]
    assert [m.has_token_queries for m in maps] == [True, True, False]


def test_a_part_of_the_weights_is_what_it_is_among_all() -> None:
    model = small_model(TOKENIZER)
    layer_map = attention_maps(model, *row_of(model)[:2])[0]
    n_tokens = layer_map.n_tokens
    keys = torch.tensor([n_tokens + 3, 0, 2])
    torch.testing.assert_close(layer_map.of_chars(1, keys), layer_map.of_chars(1)[:, keys])
    torch.testing.assert_close(layer_map.of_chars(0, first=40), layer_map.of_chars(0)[:40])
    torch.testing.assert_close(layer_map.of_chars(0, keys, first=5), layer_map.of_chars(0)[:5, keys])
    torch.testing.assert_close(layer_map.of_tokens(1, keys[1:]), layer_map.of_tokens(1)[:, keys[1:]])


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
def test_bf16_gives_float32(encoding: str) -> None:
    model = small_model(TOKENIZER, dtype=torch.bfloat16, encoding=encoding)
    exact = copy.deepcopy(model).double()
    tokens, chars, _ = row_of(model)
    for found, wanted in zip(attention_maps(model, tokens, chars), attention_maps(exact, tokens, chars), strict=True):
        weights = found.of_chars(0)
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(len(weights)))
        torch.testing.assert_close(weights.double(), wanted.of_chars(0), atol=0.05, rtol=0.0)


def test_a_pass_is_the_same_with_maps_and_leaves_no_hooks() -> None:
    model = small_model(TOKENIZER, char_layers=2)
    tokens, chars, labels = row_of(model)
    before = model(tokens, chars)
    with recorded_maps(model) as maps:
        recorded = model(tokens, chars)
    assert len(maps) == model.config.n_layers
    assert torch.equal(recorded, before)
    assert torch.equal(model(tokens, chars), before)
    assert not hooks_of(model)
    assert not any(isinstance(m, LayerMap) and m.keys.requires_grad for m in attention_maps(model, tokens, chars))
    assert torch.isfinite(model(tokens, chars, labels))


def test_a_pass_that_fails_leaves_no_hooks() -> None:
    model = small_model(TOKENIZER)
    tokens, chars, _ = row_of(model)
    with pytest.raises(IndexError):
        attention_maps(model, tokens.map(lambda a: a + 10_000), chars)
    assert not hooks_of(model)


def hooks_of(model: TidalTransformer) -> list[Any]:
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def test_the_nats_of_all_chars_are_the_loss_of_the_model() -> None:
    model = small_model(TOKENIZER)
    tokens, chars, labels = row_of(model)
    labels[0, 3] = IGNORED
    with torch.no_grad():
        logits, loss = model(tokens, chars)[0], model(tokens, chars, labels)
    scores = char_scores(logits, labels[0])
    assert torch.isnan(scores.nats).nonzero().tolist() == [[3]]
    assert torch.isnan(scores.p).nonzero().tolist() == [[3]]
    torch.testing.assert_close(scores.nats.nansum(), loss)
    torch.testing.assert_close(scores.p[0], logits[0].softmax(dim=-1)[labels[0, 0]])


def test_the_likeliest_ids_come_first() -> None:
    logits = torch.zeros(2, 261)
    logits[0, [7, 100, 31]] = torch.tensor([3.0, 2.0, 1.0])
    logits[1, 260] = 50.0
    scores = char_scores(logits.bfloat16(), torch.tensor([100, 260]))
    assert scores.ids[0].tolist() == [7, 100, 31]
    assert scores.ids[1, 0] == 260
    assert scores.nats.dtype == torch.float32
    torch.testing.assert_close(scores.probabilities[0, 1], scores.p[0])
    torch.testing.assert_close(scores.p[1], torch.tensor(1.0))
