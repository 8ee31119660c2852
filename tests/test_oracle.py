"""One pass over packed rows has the loss of the seed's way, one sample for each block: all settings."""

from collections.abc import Callable
from functools import lru_cache
from itertools import product

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from data_pipeline.layout import IGNORED
from tests.builders import document_of, packed, planned, small_model, small_tokenizer
from tidal_dist.config import ModelConfig
from tidal_dist.doctor import oracle
from tidal_dist.doctor.oracle import Sample
from tidal_dist.model import groups, split
from tidal_dist.model.transformer import TidalTransformer

TOKENIZER = small_tokenizer()
DOCUMENTS = [
    document_of("un café 潮水退 a 👍🏽 12345678 tides"),
    document_of(" 46", prompt="12 + 34 ="),
    document_of("naïve"),
    document_of(" 潮。又", prompt="déjà vu: 潮水又来, the tide runs out"),
]
CHUNKED = (24, 50)  # more than two of the longest runs of 9 chars: chunks
DENSE = (12, 18)  # not more than two; cuts the longer documents in pieces
ASKING = 20  # queries of a call of `split`, so that CHUNKED takes several and DENSE one


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "CHUNK", ASKING)
    monkeypatch.setattr(groups, "LEAST_GROUP", 1)


SHAPES = {"chunked": CHUNKED, "dense": DENSE}
ROWS = {name: planned(DOCUMENTS, TOKENIZER, shape) for name, shape in SHAPES.items()}
COMBINATIONS = list(
    product(
        ["rope", "alibi", "none"],
        ["mirrored", "forward"],
        ["block", "causal"],
        [True, False],
        [3, 1, 2],
        [True, False],
    )
)


@lru_cache
def _samples(name: str, char_positions: str, place_shift: int = 0) -> list[Sample]:
    """The samples of all pieces of the rows; they depend on no other setting."""
    config = ModelConfig(n_layers=1, width=2, n_heads=1, char_positions=char_positions)
    return [s for row in ROWS[name] for d in row for s in oracle.samples(d, TOKENIZER, config, place_shift)]


def _one_pass(model: TidalTransformer, name: str, place_shift: int = 0) -> torch.Tensor:
    batch = packed(ROWS[name], TOKENIZER, SHAPES[name], model.config.char_positions, place_shift)
    return model(batch.tokens, batch.chars, batch.labels)


def _seed_way(model: TidalTransformer, name: str, place_shift: int = 0) -> torch.Tensor:
    samples = _samples(name, model.config.char_positions, place_shift)
    return oracle.sum_of_losses(samples, model.config, model.state_dict(keep_vars=True))


def test_rows_hold_what_the_comparison_needs():
    batches = {name: packed(ROWS[name], TOKENIZER, SHAPES[name]) for name in SHAPES}
    run = TOKENIZER.segmentation.max_block_bytes + 1
    assert batches["chunked"].chars.ids.shape[1] > 2 * run >= batches["dense"].chars.ids.shape[1]
    for name, batch in batches.items():
        assert (batch.tokens.document == 0).any(), name
        assert (batch.chars.document == 0).any(), name
        assert max(len(row) for row in ROWS[name]) > 1, name
        pieces = [d for row in ROWS[name] for d in row]
        assert any(not d.ends for d in pieces), name
        assert any(d.prompt for d in pieces), name
        assert batch.label_count() == sum(len(b.encode()) + 1 for d in DOCUMENTS for b in d.text)
    blocks = [b for d in DOCUMENTS for b in d.text]
    assert max(len(b.encode()) for b in blocks) == TOKENIZER.segmentation.max_block_bytes
    assert any(len(TOKENIZER.encode_block(b)) > 1 for b in blocks)


# One in five, which meets every setting, is enough for `make check`.
NUMBERS = [n if n % 5 == 0 else pytest.param(n, marks=pytest.mark.slow) for n in range(len(COMBINATIONS))]


@pytest.mark.parametrize("number", NUMBERS)
def test_one_pass_equals_one_sample_for_each_block(number: int):
    encoding, char_positions, token_attention, places, char_layers, handoff = COMBINATIONS[number]
    model = small_model(
        TOKENIZER,
        seed=number,
        encoding=encoding,
        char_positions=char_positions,
        token_attention=token_attention,
        places=places,
        char_layers=char_layers,
        handoff=handoff,
        # In steps that share no factor with the number of choices above: each falls on all of them.
        mlp=("swiglu", "gelu")[number // 5 % 2],
        n_heads=(2, 1, 4)[number // 7 % 3],
    )
    for name in SHAPES:
        with torch.no_grad():
            one_pass, seed_way = _one_pass(model, name), _seed_way(model, name)
        torch.testing.assert_close(one_pass, seed_way, rtol=1e-10, atol=0.0, msg=lambda m, n=name: f"{n}: {m}")


def test_heads_that_are_no_power_of_two_have_the_slopes_between():
    model = small_model(TOKENIZER, encoding="alibi", n_heads=6, width=24)
    torch.testing.assert_close(_one_pass(model, "chunked"), _seed_way(model, "chunked"), rtol=1e-10, atol=0.0)


@pytest.mark.slow
def test_long_document_in_one_row():
    document = document_of("12 - 34 = -22; 潮水退去，un café 👩‍🚀 comes in. " * 6)
    shape = (300, 500)
    model = small_model(TOKENIZER)
    batch = packed([[document]], TOKENIZER, shape)
    with torch.no_grad():
        one_pass = model(batch.tokens, batch.chars, batch.labels)
        seed_way = oracle.loss(document, TOKENIZER, model.config, model.state_dict())
    torch.testing.assert_close(one_pass, seed_way, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("name", SHAPES)
def test_place_shift_moves_all_places_alike(name: str):
    model = small_model(TOKENIZER, place_shift=5)
    with torch.no_grad():
        shifted = _one_pass(model, name, place_shift=5)
        torch.testing.assert_close(shifted, _seed_way(model, name, place_shift=5), rtol=1e-10, atol=0.0)
        assert not torch.isclose(shifted, _one_pass(model, name), rtol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_agree(name: str):
    model = small_model(TOKENIZER, char_layers=2)
    _one_pass(model, name).backward()
    one_pass = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    _seed_way(model, name).backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(one_pass[n], p.grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=n: f"{n}: {m}")
        assert p.grad.any(), n


def check_activation_checkpointing(
    model: TidalTransformer, loss_of: Callable[[TidalTransformer], torch.Tensor], every: int = 1
) -> None:
    """Recomputing every so many layers changes no digit of a loss and its gradients."""
    plain = loss_of(model)
    plain.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    calls = []

    def counted(function: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape)
        return checkpoint(function, x, use_reentrant=True)

    model.checkpoint, model.checkpoint_every_layers = counted, every
    checkpointed = loss_of(model)
    checkpointed.backward()
    assert len(calls) == len(range(0, model.config.n_layers, every))
    assert torch.equal(plain, checkpointed)
    for n, p in model.named_parameters():
        assert torch.equal(gradients[n], p.grad), n


@pytest.mark.parametrize("char_layers", [3, 1])
def test_activation_checkpointing_changes_no_digit(char_layers: int):
    model = small_model(TOKENIZER, char_layers=char_layers).train()
    check_activation_checkpointing(model, lambda model: _one_pass(model, "chunked"))


def test_padding_and_company_do_not_change_a_document():
    model = small_model(TOKENIZER)
    alone = [packed([[d]], TOKENIZER, (40, 60)) for d in DOCUMENTS]
    together = packed([DOCUMENTS], TOKENIZER, (120, 200))
    with torch.no_grad():
        losses = [model(b.tokens, b.chars, b.labels) for b in alone]
        total = model(together.tokens, together.chars, together.labels)
    torch.testing.assert_close(total, torch.stack(losses).sum(), rtol=1e-10, atol=0.0)


def test_batch_without_labels_has_no_loss_and_no_nan():
    model = small_model(TOKENIZER)
    batch = packed([DOCUMENTS[:1]], TOKENIZER, (40, 60))
    loss = model(batch.tokens, batch.chars, torch.full_like(batch.labels, IGNORED))
    loss.backward()
    assert loss == 0.0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
