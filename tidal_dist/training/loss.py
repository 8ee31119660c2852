"""How a loss is normalised and reported. Pure functions."""

import math
from collections.abc import Callable


def loss_scale(labels: int, world: int, all_sum: Callable[[float], float]) -> tuple[float, int]:
    """What a rank multiplies its sum of nats by before the backward pass, and the labels of the global batch.

    The loss is normalised by the labels of the whole global batch. Gradients are averaged over the ranks, so each
    rank's sum is multiplied by their number.

    Args:
        labels: supervised labels of this rank's rows. world: number of ranks. all_sum: a number's sum over all ranks.
    """
    total = int(all_sum(labels))
    return world / max(total, 1), total


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """sum(nats, end marks included) / (ln 2 * bytes)."""
    return nats / (math.log(2) * max(text_bytes, 1))
