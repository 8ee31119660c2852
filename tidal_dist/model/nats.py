"""The loss: the sum of the cross-entropy in nats over supervised labels. B rows, N slots, V ids to choose from."""

import torch
import torch.nn.functional as F
from torch import nn

from data_pipeline.layout import IGNORED


def logits_or_nats(output: nn.Module, hidden: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Logits of normed states (B, N, width), (B, N, V); or with labels (B, N) the sum of their cross-entropy."""
    return output(hidden) if labels is None else nats(output, hidden[None], labels)[0]


def nats(output: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sums of the cross-entropy of S streams, (S,): normed states (S, B, N, width), labels (B, N) of each stream."""
    supervised = labels != IGNORED
    # Sums of many small probabilities need more than bf16.
    logits = output(hidden[:, supervised]).to(torch.promote_types(hidden.dtype, torch.float32))
    targets = labels[supervised]
    return torch.stack([F.cross_entropy(stream, targets, reduction="sum") for stream in logits])
