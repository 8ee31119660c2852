"""Kernels of attention on a GPU against the same slots in float64 on a CPU. Skipped where there is no GPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.builders import document_of, packed, small_model, small_tokenizer
from tidal_dist.model import kernels
from tidal_dist.model.attention import Scoring, attend, prepare_attention
from tidal_dist.model.kernels import MemoryEfficient

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TEXT = "the tide 12 + 34 = 46; 潮水退去, un café déjà vu "
HEADS, WIDTH, SHAPE = 2, 32, (400, 650)
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # tf32 may be on


def gradients(device: str, dtype: torch.dtype, kernel: Any, scoring: Scoring, only_chars: bool) -> list[torch.Tensor]:
    """Output and gradients of one layer's attention, on the CPU in float64; padding's outputs are 0."""
    batch = packed([[document_of(TEXT * 8)], [document_of(TEXT)] * 8], small_tokenizer(), SHAPE).to(device)
    torch.manual_seed(3)
    q, k, v, weight = (
        torch.randn(2, sum(SHAPE), HEADS, WIDTH).to(device, dtype).transpose(1, 2).requires_grad_() for _ in range(4)
    )
    real = torch.cat([batch.tokens.document, batch.chars.document], dim=1)[:, None, :, None] > 0
    first = SHAPE[0] if only_chars else 0
    prepared = prepare_attention(batch.tokens, batch.chars, 9, replace(scoring, dtype=dtype), kernel)
    assert prepared.kernel == kernel
    out = (
        checkpoint(lambda *given: attend(*given, prepared), q[:, :, first:], k, v, use_reentrant=False)
        * real[:, :, first:]
    )
    found = torch.autograd.grad(out, (q, k, v), (weight * real)[:, :, first:])
    assert all(torch.isfinite(x).all() for x in (out, *found))
    return [x.detach().double().cpu() for x in (out, *found)]


@pytest.mark.parametrize("scoring", [Scoring("block", None, torch.float32), Scoring("causal", HEADS, torch.float32)])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("kernel", ["flex", "split", "dense"])
@pytest.mark.parametrize("only_chars", [False, True])
def test_a_gpu_finds_what_a_cpu_finds(kernel: Any, dtype: torch.dtype, scoring: Scoring, only_chars: bool) -> None:
    wanted = gradients("cpu", torch.float64, "dense", scoring, only_chars)
    found = gradients("cuda", dtype, kernel, scoring, only_chars)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < CLOSE[dtype]


def test_the_efficient_kernel_takes_the_parts() -> None:
    q = torch.zeros(1, HEADS, 8, WIDTH, device="cuda", dtype=torch.bfloat16)
    assert kernels.kernel_for(q) is MemoryEfficient
    assert kernels.kernel_for(q[..., :12]) is not MemoryEfficient


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
def test_a_model_trains_with_flex_as_with_split(encoding: str) -> None:
    """Layers that chars do not pass, rows of several lengths, without and with gradients."""
    losses = {}
    for kernel in ("flex", "split"):
        shape = {"width": 64, "n_heads": 2, "char_layers": 1, "handoff": True}
        model = small_model(small_tokenizer(), dtype=torch.float32, encoding=encoding, **shape).cuda().train()
        model.attention = kernel
        losses[kernel] = []
        for row_shape in (SHAPE, (300, 700)):
            batch = packed([[document_of(TEXT)] * 8], small_tokenizer(), row_shape).to("cuda")
            loss = model(batch.tokens, batch.chars, batch.labels)
            loss.backward()
            with torch.no_grad():
                again = model(batch.tokens, batch.chars, batch.labels)
            norms = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
            losses[kernel] += [loss.item(), again.item(), *norms]
    assert losses["flex"] == pytest.approx(losses["split"], rel=2e-3)
