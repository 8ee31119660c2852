"""How the likelihood of a text is reported, and what greedy decoding would write."""

import math

import torch

from data_pipeline.layout import IGNORED


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """sum(nats, end marks included) / (ln 2 * bytes)."""
    return nats / (math.log(2) * max(text_bytes, 1))


def exactly_predicted(logits: torch.Tensor, documents: torch.Tensor, labels: torch.Tensor) -> tuple[int, int]:
    """Documents of packed rows whose every label is the likeliest id: what greedy decoding writes, and how many in all.

    Greedy decoding takes up its own ids; as long as they are the labels it computes what is computed here.

    Args:
        logits: (B, C, V). documents: (B, C) number within the row, 0 for padding. labels: (B, C).
    """
    supervised = labels != IGNORED
    missed = supervised & (logits.argmax(dim=-1) != labels)
    rows, n = len(documents), int(documents.max()) + 1
    of = documents + n * torch.arange(rows, device=documents.device)[:, None]
    counts, misses = (torch.bincount(of[where], minlength=rows * n) for where in (supervised, missed))
    return int(((counts > 0) & (misses == 0)).sum()), int((counts > 0).sum())
