"""A draft head: its layers say of the chars what a model whose chars pass no others would say, and training it changes
neither what the model is nor the loss that is reported."""

from typing import Any

import pytest
import torch

from data_pipeline.layout import IGNORED
from data_pipeline.stream import Batch
from tests.builders import packed, small_model
from tests.test_baselines import PLAIN
from tests.test_oracle import ROWS, SHAPES, TOKENIZER, check_activation_checkpointing
from tidal_dist.config import ModelConfig
from tidal_dist.doctor import oracle
from tidal_dist.model import groups, split
from tidal_dist.model.transformer import Layer, TidalTransformer

# Of three layers.
SETTINGS: list[dict[str, Any]] = [
    {"encoding": "rope", "draft_layers": 1},
    {"encoding": "alibi", "char_positions": "forward", "draft_layers": 2},
    {"encoding": "none", "token_attention": "causal", "char_layers": 2, "draft_layers": 1, "mlp": "gelu"},
    {"encoding": "rope", "char_layers": 2, "handoff": False, "places": False, "draft_layers": 1},
    {"encoding": "rope", "handoff": True, "draft_layers": 2, "draft_weight": 1.5},
]
CASES = [pytest.param(settings, name, id=f"{i} {name}") for i, settings in enumerate(SETTINGS) for name in SHAPES]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "CHUNK", 20)
    monkeypatch.setattr(groups, "LEAST_GROUP", 1)


def rows(name: str, config: ModelConfig) -> Batch:
    return packed(ROWS[name], TOKENIZER, SHAPES[name], config.char_positions)


def samples(name: str, config: ModelConfig) -> list[oracle.Sample]:
    return [sample for row in ROWS[name] for d in row for sample in oracle.samples(d, TOKENIZER, config)]


def as_model_of_its_own(model: TidalTransformer) -> tuple[ModelConfig, oracle.Weights]:
    """The settings and weights of a model whose chars pass the draft's layers alone."""
    config = model.config
    shallow = {"char_layers": config.draft_layers, "handoff": True, "draft_layers": None}
    weights = {n: w for n, w in model.state_dict(keep_vars=True).items() if not n.startswith("handoff")}
    return config.model_copy(update=shallow), {n.removeprefix("draft_"): w for n, w in weights.items()}


def taught(model: TidalTransformer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a training pass, and the logits (2, labels, V) of the chars and of the drafts."""
    seen: list[torch.Tensor] = []
    hook = model.output.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits))
    batch = rows(name, model.config)
    loss = model.train()(batch.tokens, batch.chars, batch.labels)
    hook.remove()
    (logits,) = seen
    return loss, logits


@pytest.mark.parametrize(
    ("kernel", "settings", "name"),
    [*(("split", *case.values) for case in CASES), ("dense", SETTINGS[1], "dense"), ("dense", SETTINGS[2], "chunked")],
)
def test_a_draft_is_what_a_model_of_its_layers_says(kernel: Any, settings: dict[str, Any], name: str) -> None:
    model = small_model(TOKENIZER, **settings)
    model.attention = kernel
    whole, alone = (model.config, model.state_dict()), as_model_of_its_own(model)
    with torch.no_grad():
        _, logits = taught(model, name)
        for found, (config, weights) in zip(logits, (whole, alone), strict=True):
            truth = torch.cat([oracle.logits(sample, config, weights) for sample in samples(name, config)])
            torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(logits[0], logits[1], atol=0.1)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_loss_is_that_of_the_same_model_without_a_draft_head(settings: dict[str, Any]) -> None:
    model = small_model(TOKENIZER, **settings)
    plain = small_model(TOKENIZER, **settings | {"draft_layers": None})
    plain.load_state_dict({n: w for n, w in model.state_dict().items() if not n.startswith("draft_")})
    batch = rows("chunked", model.config)
    with torch.no_grad():
        losses = [m.eval()(batch.tokens, batch.chars, batch.labels) for m in (plain, model)]
        assert torch.equal(*losses)
        assert torch.equal(*(m(batch.tokens, batch.chars) for m in (plain, model)))
        assert torch.equal(model.train()(batch.tokens, batch.chars), plain(batch.tokens, batch.chars))
        loss, logits = taught(model, "chunked")
        torch.testing.assert_close(loss, losses[0], rtol=1e-12, atol=0.0)
    labels = batch.labels[batch.labels != IGNORED]
    assert loss == torch.nn.functional.cross_entropy(logits[0], labels, reduction="sum")  # no digit of the drafts'


@pytest.mark.parametrize(("settings", "name"), CASES[::3])
def test_the_gradient_is_that_of_both(settings: dict[str, Any], name: str) -> None:
    model = small_model(TOKENIZER, **settings)
    taught(model, name)[0].backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    config, weights = as_model_of_its_own(model)
    of_chars = oracle.sum_of_losses(samples(name, config), model.config, model.state_dict(keep_vars=True))
    of_drafts = oracle.sum_of_losses(samples(name, config), config, weights)
    (of_chars + model.config.draft_weight * of_drafts).backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(found[n], p.grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}")
        assert p.grad.any(), n


def test_every_module_is_called_once_in_a_training_pass() -> None:
    """DeepSpeed fetches the weights of a module, and sums up its gradients, by the calls of it."""
    model = small_model(TOKENIZER, char_layers=2, draft_layers=1)
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    taught(model, "chunked")
    embeddings = {"embedding": 2, "place_embedding": 2}  # tokens and chars, as without a draft head
    assert calls == dict.fromkeys(calls, 1) | embeddings
    assert len(calls) == sum(not list(module.children()) for module in model.modules())


@pytest.mark.parametrize("every", [1, 2])
def test_activation_checkpointing_changes_no_digit(every: int) -> None:
    model = small_model(TOKENIZER, char_layers=2, draft_layers=1)
    check_activation_checkpointing(model, lambda model: taught(model, "chunked")[0], every)


def test_without_labels_nothing_is_drafted() -> None:
    model, slots = small_model(TOKENIZER, char_layers=2, draft_layers=1).train(), set()
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.register_forward_pre_hook(lambda _module, inputs: slots.add(inputs[0].shape[1]))
    batch = rows("dense", model.config)
    tokens, chars = SHAPES["dense"]
    model(batch.tokens, batch.chars)
    assert slots == {tokens, tokens + chars}
    model(batch.tokens, batch.chars, batch.labels)
    assert slots == {tokens, tokens + chars, tokens + 2 * chars}


def test_a_batch_without_labels_has_no_loss_and_no_nan() -> None:
    model = small_model(TOKENIZER, draft_layers=1)
    batch = rows("dense", model.config)
    loss = model.train()(batch.tokens, batch.chars, torch.full_like(batch.labels, IGNORED))
    loss.backward()
    assert loss == 0.0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"draft_layers": 3}, "draft_layers 3 is not less than the layers that chars pass, 3"),
        ({"char_layers": 1, "draft_layers": 1}, "draft_layers 1 is not less than the layers that chars pass, 1"),
        ({"draft_layers": 0}, "greater than or equal to 1"),
        ({"draft_layers": 1, "draft_weight": 0.0}, "greater than 0"),
        ({**PLAIN, "writes": "bytes", "draft_layers": 1}, "needs no draft_layers"),
    ],
)
def test_what_cannot_draft_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ModelConfig(n_layers=3, width=8, n_heads=2, **settings)
