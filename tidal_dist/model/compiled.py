"""Layers compiled by PyTorch's compiler: all that they do beside attention, as few, larger kernels."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

from tidal_dist.model.transformer import Layer, TidalTransformer

_SHAPES = 256  # that are compiled at most
_METHODS = ("project", "finish")


def compile_layers(model: TidalTransformer, in_training_only: bool = False) -> None:
    """Have all that layers do beside attention compiled, which takes up to a minute when it is first done.

    One compilation serves all layers; each shape takes one of its own.

    Args:
        in_training_only: validation, whose shapes are many and whose maps look into layers, goes on as it was.
    """
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, _SHAPES)
    for name in _METHODS:
        plain = getattr(Layer, name)
        compiled = torch.compile(plain, dynamic=False, fullgraph=True)
        method = _chosen(compiled, plain) if in_training_only else compiled
        for layer in model.layers:
            vars(layer)[name] = MethodType(method, layer)


def _chosen(compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def method(layer: Layer, *arguments: Any) -> Any:
        return (compiled if layer.training else plain)(layer, *arguments)

    return method
