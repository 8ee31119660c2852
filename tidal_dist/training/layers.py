"""What is watched of every layer: the norm of its gradient, and samples of its weights and gradients.

A rank holds part of each under ZeRO: norms are those of whole gradients, samples are of what this rank owns.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

_SAMPLES = 20_000  # of a layer's numbers, about


def layer_of(parameter: str) -> str:
    """The layer that a parameter belongs to: `layers.02`, else the module at the top (`embedding`, `output`)."""
    if found := re.match(r"layers\.(\d+)\.", parameter):
        return f"layers.{int(found[1]):02d}"
    return parameter.partition(".")[0]


def norms_by_layer(norms: Mapping[str, float]) -> dict[str, float]:
    """The norm of each layer's gradient, from those of its parameters."""
    squares: dict[str, float] = {}
    for name, norm in norms.items():
        squares[layer_of(name)] = squares.get(layer_of(name), 0.0) + norm**2
    return {layer: math.sqrt(square) for layer, square in squares.items()}


def owned_weights(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The name of every parameter and the flat slice of it that this rank owns; without ZeRO-3 all of it."""
    for name, parameter in engine.module.named_parameters():
        yield name, getattr(parameter, "ds_tensor", parameter).detach().flatten()


def samples(slices: Iterable[tuple[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    """Of each layer as many numbers, at regular intervals, as a histogram needs."""
    by_layer: dict[str, list[torch.Tensor]] = {}
    for name, numbers in slices:
        by_layer.setdefault(layer_of(name), []).append(numbers)
    return {layer: _sample(tensors) for layer, tensors in by_layer.items()}


def _sample(tensors: list[torch.Tensor]) -> np.ndarray:
    stride = max(1, sum(t.numel() for t in tensors) // _SAMPLES)
    return torch.cat([t[::stride].float().cpu() for t in tensors]).numpy()
