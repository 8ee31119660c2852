"""Choosing the next char from its logits. Pure functions."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How chars are chosen: greedily at temperature 0, else by sampling.

    Attributes:
        temperature: divides the logits. top_k: keep the k likeliest; 0: all.
        top_p: keep the likeliest until their probabilities reach p. seed: of this request's random numbers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One id from logits (V,); excluded ids have -inf."""
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    probabilities = keep(logits / sampling.temperature, sampling.top_k, sampling.top_p).softmax(dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def keep(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The logits (V,) with those outside the top k, and outside the nucleus of probability p, set to -inf.

    Nucleus sampling: Holtzman et al. 2020. The likeliest id is always kept.
    """
    ordered, ids = logits.sort(descending=True, stable=True)
    if top_k:
        ordered[top_k:] = -torch.inf
    if top_p < 1.0:
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        if torch.isneginf(ordered).all():
            ordered[0] = 0.0
    return torch.empty_like(logits).scatter_(0, ids, ordered)
