"""The plain decoder: it sees no later id, its loss is what one computes by hand, its figures are PyTorch's."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.layout import IGNORED
from data_pipeline.tokenizer import BOS, PAD
from tidal_dist.config import ModelConfig
from tidal_dist.model.plain import (
    PlainDecoder,
    next_ids,
    of_equal_size,
    plain_flops,
    plain_parameters,
)

VOCABULARY = 300
SHAPES: list[dict[str, Any]] = [
    {"encoding": "rope"},
    {"encoding": "alibi", "mlp": "gelu"},
    {"encoding": "none", "mlp_width": 24},
]


def decoder(output_size: int = 261, **settings: Any) -> PlainDecoder:
    torch.manual_seed(0)
    model = PlainDecoder(ModelConfig(n_layers=2, width=16, n_heads=2, **settings), VOCABULARY, output_size).double()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def some_ids(rows: int = 2, n: int = 11) -> torch.Tensor:
    return torch.randint(0, 256, (rows, n), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_position_sees_itself_and_all_before_it_and_nothing_behind(shape: dict[str, Any]) -> None:
    model, ids = decoder(**shape), some_ids(1)
    before = model(ids)
    for changed in range(ids.shape[1]):
        other = ids.clone()
        other[0, changed] = 299
        moved = (model(other) - before).abs().amax(dim=-1)[0] > 1e-12
        assert moved.tolist() == [i >= changed for i in range(ids.shape[1])]


def by_hand(model: PlainDecoder, ids: list[int], labels: list[int]) -> float:
    """The loss of one row, position by position, head by head, from the weights alone."""
    config, weights = model.config, dict(model.state_dict())
    width, heads = config.width, config.n_heads
    size = width // heads

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        if config.encoding != "rope":
            return x
        angle = position * config.rope_base ** (-torch.arange(0, size, 2).double() / size)
        pairs = torch.complex(x[: size // 2], x[size // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pairs.real, pairs.imag])

    x = weights["embedding.weight"][ids] * width**0.5
    for i in range(config.n_layers):
        name = f"layers.{i}.layer"
        h = norm(x, f"{name}.attention_norm")
        queries = h @ weights[f"{name}.query.weight"].T
        keys, values = (h @ weights[f"{name}.key_value.weight"].T).split(width, dim=-1)
        rows = []
        for q in range(len(ids)):
            parts = []
            for head in range(heads):
                own = slice(head * size, (head + 1) * size)
                scores = torch.stack(
                    [
                        turned(queries[q, own], q) @ turned(keys[k, own], k) / size**0.5
                        - (2.0 ** (-8 * (head + 1) / heads) * (q - k) if config.encoding == "alibi" else 0.0)
                        for k in range(q + 1)
                    ]
                )
                parts.append(scores.softmax(0) @ values[: q + 1, own])
            rows.append(torch.cat(parts))
        x = x + torch.stack(rows) @ weights[f"{name}.out.weight"].T
        hidden = norm(x, f"{name}.mlp_norm") @ weights[f"{name}.mlp.up.weight"].T
        if config.mlp == "swiglu":
            gate, value = hidden.chunk(2, dim=-1)
            hidden = gate * gate.sigmoid() * value
        else:
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + hidden @ weights[f"{name}.mlp.down.weight"].T
    logits = norm(x, "norm") @ weights["output.weight"].T
    chosen = [(i, label) for i, label in enumerate(labels) if label != IGNORED]
    return float(sum(logits[i].logsumexp(0) - logits[i, label] for i, label in chosen))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("output_size", [261, VOCABULARY])
def test_the_loss_is_what_one_computes_by_hand(shape: dict[str, Any], output_size: int) -> None:
    model, ids = decoder(output_size, **shape), some_ids()
    ids[1, 7:] = PAD
    labels = next_ids(ids)
    expected = sum(by_hand(model, row.tolist(), y.tolist()) for row, y in zip(ids, labels, strict=True))
    assert model(ids, labels).item() == pytest.approx(expected, rel=1e-12)


def test_the_label_is_the_next_id_and_padding_has_none() -> None:
    ids = torch.tensor([[BOS, 5, 0, BOS, 7], [BOS, 9, PAD, PAD, PAD]])
    assert next_ids(ids).tolist() == [[5, 0, BOS, 7, IGNORED], [9, *[IGNORED] * 4]]


def test_layers_computed_again_give_the_same_gradients() -> None:
    model, ids = decoder(), some_ids()
    model(ids, next_ids(ids)).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    runs = []

    def counted(function: Any, x: torch.Tensor) -> torch.Tensor:
        runs.append(x.shape)
        return checkpoint(function, x, use_reentrant=False)

    model.checkpoint, model.checkpoint_every_layers = counted, 2
    model(ids, next_ids(ids)).backward()
    assert len(runs) == 1
    for gradient, parameter in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_and_flops_are_what_pytorch_counts(shape: dict[str, Any]) -> None:
    config = ModelConfig(n_layers=3, width=32, n_heads=2, **shape)
    with torch.device("meta"):
        model, ids = PlainDecoder(config, 500, 400), torch.zeros(2, 40, dtype=torch.int64)
    assert plain_parameters(config, 500, 400) == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids)
    assert counter.get_total_flops() == 2 * plain_flops(config, 40, 400)


@pytest.mark.parametrize("width", [64, 256, 1024])
@pytest.mark.parametrize("vocabulary", [261, 8261])
def test_a_decoder_of_equal_size_has_as_many_parameters(width: int, vocabulary: int) -> None:
    config = ModelConfig(n_layers=6, width=width, n_heads=width // 32)
    wanted = plain_parameters(config, 8261, 8261)
    found = of_equal_size(config, wanted, vocabulary, vocabulary)
    assert plain_parameters(found, vocabulary, vocabulary) == pytest.approx(wanted, rel=0.02)
    assert found.n_layers == 6
    assert found.width / found.n_heads == 32
    assert 0.5 < found.hidden_width / found.width / (config.hidden_width / config.width) < 2
    if vocabulary == 8261:
        assert found.width == width


def test_too_few_parameters_for_the_embeddings_are_refused() -> None:
    with pytest.raises(ValueError, match="too few for 16,522 rows"):
        of_equal_size(ModelConfig(n_layers=1, width=16, n_heads=2), 1000, 8261, 8261)
