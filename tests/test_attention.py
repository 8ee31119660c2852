"""Kernels of attention against the softmax over what the layout's predicate lets through, forward and backward."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention
from torch.utils.checkpoint import checkpoint

from data_pipeline.layout import Slots, may_see
from data_pipeline.stream import Batch
from tests.builders import document_of, packed, small_model, small_tokenizer
from tidal_dist.doctor.oracle import press_slope
from tidal_dist.model import attention, flex, groups, kernels, split
from tidal_dist.model.attention import Prepared, Scoring, attend, prepare_attention
from tidal_dist.model.kernels import FusedOnCpu, Plain
from tidal_dist.model.scores import bias
from tidal_dist.training import run as run_module
from tidal_dist.training import validation
from tidal_dist.training.run import Run
from tidal_dist.training.validation import attention_share

TOKENIZER = small_tokenizer()
LONGEST_RUN = 9
HEADS, WIDTH = 2, 4
TEXT = "the tide 12 + 34 = 46; 潮水退去, un café déjà vu "
ROWS = [
    [document_of(TEXT * 3)],
    [document_of(TEXT), document_of(" 46", prompt="12 + 34 ="), document_of(TEXT)],
    [document_of("12345678")],  # hardly more than padding
]
SHAPE = (150, 250)
SCORINGS = [Scoring("block", None, torch.float64), Scoring("causal", 2, torch.float64)]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "CHUNK", 32)
    monkeypatch.setattr(groups, "LEAST_GROUP", 12)
    monkeypatch.setattr(split, "_CALL_PAIRS", 64)  # rows of such lengths would be taken together


@lru_cache
def batch() -> Batch:
    made = packed(ROWS, TOKENIZER, SHAPE)
    assert (made.tokens.document == 0).any()
    assert (made.chars.document == 0).any()
    return made


@lru_cache
def truth(scoring: Scoring) -> torch.Tensor:
    """The biases of all slots to all slots, from the predicate and the published slopes, (B, H, N, N)."""
    streams = [batch().tokens, batch().chars]
    sees = torch.cat(
        [torch.cat([may_see(q.queries(), k.keys(), scoring.token_attention) for k in streams], -1) for q in streams], 1
    )
    position = torch.cat([stream.position for stream in streams], dim=1).double()
    distance = (position[:, :, None] - position[:, None, :]).abs()
    slopes = [press_slope(head, HEADS) if scoring.alibi_heads else 0.0 for head in range(HEADS)]
    table = torch.stack([-slope * distance for slope in slopes], dim=1)
    return table.masked_fill(~sees[:, None], -torch.inf)


def inputs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Queries, keys and values of all slots as a layer makes them, and what their outputs weigh in the loss."""
    torch.manual_seed(3)
    shape = (len(ROWS), sum(SHAPE), HEADS, WIDTH)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).transpose(1, 2) for _ in range(4)]


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    sees_nothing = table.isinf().all(dim=-1, keepdim=True)
    return (q @ k.mT * WIDTH**-0.5 + table.masked_fill(sees_nothing, 0.0)).softmax(dim=-1) @ v


CASES = {
    "all": (slice(0, 400), slice(0, 400)),
    "tokens": (slice(0, 150),) * 2,
    "chars": (slice(150, 400), slice(0, 400)),
}


def compare(found: Attend, scoring: Scoring, case: str, dtype: torch.dtype = torch.float64, **close: float) -> None:
    """Outputs and gradients of slots that are no padding; those of padding are 0 or finite."""
    asking, keys = CASES[case]
    given = inputs(dtype)
    q, k, v = (x[:, :, s].detach().requires_grad_() for x, s in zip(given, (asking, keys, keys), strict=False))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    real = torch.cat([batch().tokens.document, batch().chars.document], dim=1)[:, None, asking, None] > 0
    weight = given[3][:, :, asking] * real
    ours, wanted = found(q, k, v), by_hand(*exact, truth(scoring)[:, :, asking, keys])
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(ours * real, (wanted * real).to(dtype), **close)
    gradients = torch.autograd.grad(ours, (q, k, v), weight)
    expected = torch.autograd.grad(wanted, exact, weight.double())
    for ours_of, wanted_of in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours_of, wanted_of.to(dtype), **close)


EXACT = {"rtol": 1e-10, "atol": 1e-12}


def prepared(scoring: Scoring, kernel: Any = "split") -> Prepared:
    return prepare_attention(batch().tokens, batch().chars, LONGEST_RUN, scoring, kernel)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("kernel", [FusedOnCpu, Plain])
@pytest.mark.parametrize("asks_rows", [True, False])
def test_parts_are_attention_over_all_that_is_seen(
    case: str, scoring: Scoring, kernel: Any, asks_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "kernel_for", lambda _: kernel)
    monkeypatch.setattr(split, "asks_rows", lambda _: asks_rows)
    parts = prepared(scoring)
    assert isinstance(parts, split.Split)
    assert any(part.windows > 1 for part in parts.char_parts)
    assert any(part.joins for part in parts.char_parts)
    assert any(part.rows == slice(1, 2) and part.windows == 1 for part in parts.token_parts) == asks_rows
    compare(lambda *qkv: attend(*qkv, parts), scoring, case, **EXACT)


@pytest.mark.parametrize("chars", [0, 1, 31, 33, 36, 37, 54, 250])
def test_any_number_of_chars(chars: int) -> None:
    scoring = SCORINGS[0]
    cut = batch().chars.map(lambda a: a[:, :chars])
    ours = prepare_attention(batch().tokens, cut, LONGEST_RUN, scoring)
    n = SHAPE[0] + chars
    q, k, v, _ = (x[:, :, :n] for x in inputs())
    real = torch.cat([batch().tokens.document, cut.document], dim=1)[:, None, :, None] > 0
    wanted = by_hand(q, k, v, truth(scoring)[:, :, :n, :n])
    torch.testing.assert_close(attend(q, k, v, ours) * real, wanted * real, **EXACT)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scoring", SCORINGS)
def test_all_pairs(case: str, scoring: Scoring) -> None:
    compare(lambda *qkv: attend(*qkv, prepared(scoring, "dense")), scoring, case, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "scoring"), [("chars", SCORINGS[0]), ("all", SCORINGS[1])])
def test_flex_attention(case: str, scoring: Scoring, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled: PyTorch's own definition of it, whose backward pass it does not let a CPU make."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    blocks = flex.flex(batch().tokens, batch().chars, LONGEST_RUN, scoring)
    compare(lambda *qkv: attend(*qkv, blocks), scoring, case, rtol=1e-6, atol=1e-7)  # alibi's slopes are float32


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float32, 1e-4, 1e-5), (torch.bfloat16, 0.05, 0.05)])
def test_other_types(dtype: torch.dtype, rtol: float, atol: float) -> None:
    for scoring in SCORINGS:
        parts = prepared(replace(scoring, dtype=dtype))
        compare(lambda *qkv, p=parts: attend(*qkv, p), scoring, "all", dtype, rtol=rtol, atol=atol)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_tables_say_what_kernels_compute(scoring: Scoring) -> None:
    of_flex = flex.flex(batch().tokens, batch().chars, LONGEST_RUN, scoring)
    for ours in (prepared(scoring), prepared(scoring, "dense"), of_flex):
        table = ours.table(slice(None))
        hidden = table < torch.finfo(torch.float64).min / 4
        assert torch.equal(hidden.expand(-1, HEADS, -1, -1), truth(scoring).isinf()), ours.kernel
        torch.testing.assert_close(
            table.masked_fill(hidden, 0.0).expand(-1, HEADS, -1, -1),
            truth(scoring).masked_fill(truth(scoring).isinf(), 0),
        )
        assert torch.equal(ours.table(slice(140, 170)), table[:, :, 140:170])
        if ours.kernel != "flex":  # whose blocks reach over the ends of a row
            assert ours.computed_pairs() == int((table[:, 0] > -torch.inf).sum())
    assert int((~truth(scoring)[:, 0].isinf()).sum()) <= prepared(scoring).computed_pairs() < 3 * 400 * 400 / 4


def test_a_table_is_made_of_the_rows_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    of_flex, asked = flex.flex(batch().tokens, batch().chars, LONGEST_RUN, SCORINGS[0]), list[int]()

    def counted(query: Slots, key: Slots, scoring: Scoring) -> torch.Tensor:
        asked.append(query.ids.shape[1])
        return bias(query, key, scoring)

    monkeypatch.setattr(flex, "bias", counted)
    for rows, tokens, chars in ((slice(140, 170), 10, 20), (slice(0, 3), 3, 0), (slice(399, 400), 0, 1)):
        asked.clear()
        assert of_flex.table(rows).shape[2] == tokens + chars
        assert asked == [tokens, chars, chars]
    without_chars = flex.flex(batch().tokens, batch().chars.map(lambda a: a[:, :0]), LONGEST_RUN, SCORINGS[0])
    table = without_chars.table(slice(None))
    assert table.shape[2:] == (SHAPE[0], SHAPE[0])
    assert torch.equal(without_chars.table(slice(7, 9)), table[:, :, 7:9])


def test_blocks_are_those_of_the_predicate() -> None:
    """Element by element: the function that the kernel asks, and which blocks it asks about, skips or takes whole."""
    rows = packed([[document_of(TEXT * 8)], [document_of(TEXT)] * 8], TOKENIZER, (400, 650))
    for token_attention in ("block", "causal"):
        scoring = Scoring(token_attention, None, torch.float32)
        blocks = flex.flex(rows.tokens, rows.chars, LONGEST_RUN, scoring)
        for asking, query, keys in (
            (blocks.tokens, rows.tokens, [rows.tokens]),
            (blocks.chars, rows.chars, [rows.tokens, rows.chars]),
        ):
            sees = torch.cat([may_see(query.queries(), key.keys(), token_attention) for key in keys], dim=-1)
            assert asking is not None
            q, k = (torch.arange(n) for n in sees.shape[1:])
            asked = asking.blocks.mask_mod(torch.arange(2)[:, None, None], torch.zeros(()), q[:, None], k)
            assert torch.equal(asked, sees)
            assert_blocks(asking.blocks, sees)


def assert_blocks(blocks: Any, sees: torch.Tensor) -> None:
    for row, sees_of_row in enumerate(sees.numpy()):
        for q in range(-(-sees.shape[1] // flex.BLOCK)):
            partly = set(blocks.kv_indices[row, 0, q, : blocks.kv_num_blocks[row, 0, q]].tolist())
            whole = set(blocks.full_kv_indices[row, 0, q, : blocks.full_kv_num_blocks[row, 0, q]].tolist())
            assert not partly & whole
            for k in range(-(-sees.shape[2] // flex.BLOCK)):
                at = [slice(n * flex.BLOCK, (n + 1) * flex.BLOCK) for n in (q, k)]
                block = sees_of_row[at[0], at[1]]
                is_whole = block.shape == (flex.BLOCK, flex.BLOCK) and bool(np.all(block))
                assert (k in whole) == is_whole
                assert (k in partly) == (bool(np.any(block)) and not is_whole)


def test_checkpointing_changes_no_digit_and_nothing_is_kept_without_gradients() -> None:
    parts, (*qkv, weight) = prepared(SCORINGS[0]), inputs()
    for x in qkv:
        x.requires_grad_()
    plain = torch.autograd.grad(attend(*qkv, parts), qkv, weight)
    for reentrant in (True, False):
        again = checkpoint(lambda *given: attend(*given, parts), *qkv, use_reentrant=reentrant)
        if reentrant:
            again.backward(weight)
            gradients = [x.grad for x in qkv]
        else:
            gradients = torch.autograd.grad(again, qkv, weight)
        assert all(torch.equal(one, other) for one, other in zip(plain, gradients, strict=True))
    with torch.no_grad():
        assert attend(*qkv, parts).grad_fn is None


def test_a_kernel_that_is_not_there_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    attention._say_once.cache_clear()
    assert [prepared(SCORINGS[0], kernel).kernel for kernel in ("auto", "dense")] == ["split", "dense"]
    assert capsys.readouterr().err == ""
    assert [prepared(SCORINGS[0], "flex").kernel for _ in range(2)] == ["split"] * 2
    reason = "it has no kernel for the backward pass on the device cpu"
    assert capsys.readouterr().err == f"attention: flex cannot be used: {reason}; split is used instead\n"


def test_the_share_of_pairs_that_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "device", lambda: "cpu")
    model = small_model(TOKENIZER)
    computed = {"split": prepared(SCORINGS[0]).computed_pairs() / 3, "dense": 150 * 150 + 250 * 400}
    for model.attention, pairs in computed.items():
        assert attention_share(model, [batch()]) == {"validation/attention_share": pairs / 400**2}
    assert attention_share(model, []) == {}


def test_the_share_is_found_once_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([{"validation/attention_share": 0.25}])
    monkeypatch.setattr(run_module, "attention_share", lambda *_: next(found))
    parts: dict[str, Any] = dict.fromkeys(field.name for field in fields(Run))
    run = Run(**parts | {"engine": SimpleNamespace(module=None), "data": SimpleNamespace(validation=[])})
    assert [run.attention_share for _ in range(2)] == [{"validation/attention_share": 0.25}] * 2


@pytest.mark.parametrize(
    ("scoring", "kernel", "told"),
    [
        (Scoring("block", None, torch.bfloat16, 64), "flex", ""),
        (Scoring("block", None, torch.bfloat16, 8), "split", "its kernels take heads of width 16 or more, not 8"),
        (Scoring("block", None, torch.float64, 64), "split", "its kernels do not take torch.float64"),
    ],
)
def test_what_a_gpu_uses(scoring: Scoring, kernel: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    attention._say_once.cache_clear()
    assert attention.usable_kernel("auto", "cuda", scoring) == kernel
    line = capsys.readouterr().err
    assert line == (f"attention: flex cannot be used: {told}; split is used instead\n" if told else "")
