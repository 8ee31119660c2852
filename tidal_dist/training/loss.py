"""How a loss is normalised."""

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
