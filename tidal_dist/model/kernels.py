"""Attention of some queries over some keys, as a part of all that they see: kernels that also give the log-sum-exp.

Queries and outputs (B, H, Q, D), keys and values (B, H, K, D), biases (B, 1 or H, Q, K), log-sum-exps of the scores
(B, H, Q). A backward pass is given output and log-sum-exp of ALL keys, and gives the gradients that are due to its own:
the weights of these keys are exp(score - log-sum-exp), whatever else was in the sum (ring attention, Liu et al. 2023).
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_OPS = torch.ops.aten


class Kernel(Protocol):
    """One way to compute attention over a part of the keys."""

    @staticmethod
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> Any:
        """Output and log-sum-exp of these keys alone."""

    @staticmethod
    def backward(
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        log_sum: torch.Tensor,
        bias: torch.Tensor,
    ) -> Gradients:
        """Gradients of queries, keys and values by these keys; `out` and `log_sum` are those of all keys."""


class Plain:
    """Matrix products, for every device and type; keeps all scores of a call while it runs."""

    @staticmethod
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> Any:
        """See Kernel."""
        scores = _scores(q, k, bias)
        log_sum = scores.logsumexp(dim=-1)
        return (scores - log_sum[..., None]).exp().to(v.dtype) @ v, log_sum

    @staticmethod
    def backward(
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        log_sum: torch.Tensor,
        bias: torch.Tensor,
    ) -> Gradients:
        """See Kernel. Dao et al. 2022 (FlashAttention), appendix B.2."""
        weights = (_scores(q, k, bias) - log_sum[..., None]).exp()
        along = (grad * out).sum(dim=-1, keepdim=True, dtype=weights.dtype)
        by_score = (weights * (grad @ v.mT - along) * q.shape[-1] ** -0.5).to(q.dtype)
        return by_score @ k, by_score.mT @ q, weights.to(grad.dtype).mT @ grad


def _scores(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(B, H, Q, K), in at least float32."""
    return (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5 + bias


class FusedOnCpu:
    """PyTorch's flash attention for CPUs: takes every stride, head width and floating type."""

    @staticmethod
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> Any:
        """See Kernel."""
        return _OPS._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)

    @staticmethod
    def backward(
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        log_sum: torch.Tensor,
        bias: torch.Tensor,
    ) -> Gradients:
        """See Kernel."""
        return _OPS._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, log_sum, 0.0, False, attn_mask=bias
        )


class MemoryEfficient:
    """PyTorch's memory-efficient attention for CUDA devices."""

    @staticmethod
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> Any:
        """See Kernel."""
        out, log_sum, _, _ = _OPS._scaled_dot_product_efficient_attention(q, k, v, _aligned(bias, q), True)
        return out, log_sum[..., : q.shape[2]]

    @staticmethod
    def backward(
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        log_sum: torch.Tensor,
        bias: torch.Tensor,
    ) -> Gradients:
        """See Kernel."""
        # The kernel reads whole blocks of 32 log-sum-exps.
        log_sum = F.pad(log_sum, (0, -q.shape[2] % 32), value=torch.inf)
        no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
        by_q, by_k, by_v, _ = _OPS._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, _aligned(bias, q), out, log_sum, no_dropout, no_dropout, 0.0, [True, True, True, False]
        )
        return by_q, by_k, by_v


def _aligned(bias: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """For all heads, its rows a multiple of 16 bytes apart, as the kernel reads them."""
    n_keys = bias.shape[3]
    if n_keys % 16:
        bias = F.pad(bias, (0, -n_keys % 16))[..., :n_keys]
    return bias.expand(-1, q.shape[1], -1, -1)


def kernel_for(q: torch.Tensor) -> type[Kernel]:
    """The fastest kernel that takes such queries."""
    if q.device.type == "cpu":
        return FusedOnCpu
    # Rows of heads are read 16 bytes at a time.
    takes_type = q.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if q.device.type == "cuda" and takes_type and q.shape[-1] * q.element_size() % 16 == 0:
        return MemoryEfficient
    return Plain
