"""Memory of weights, gradients, optimizer and DeepSpeed's buffers on each GPU, and in the host memory of each node.

Follows DeepSpeed 0.19: ZeRO (Rajbhandari et al. 2020), ZeRO++'s secondary partition (Wang et al. 2023), its defaults.
P parameters, W ranks; in bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tidal_dist.planning.parameters import Parameters

_FP32 = 4
_ADAM_STATES = 2  # moments, float32
ZERO_DEFAULTS = {
    "reduce_bucket_size": 5e8,
    "allgather_bucket_size": 5e8,
    "sub_group_size": 1e9,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
    "stage3_max_live_parameters": 1e9,
    "zero_hpz_partition_size": 1,
}


@dataclass(frozen=True)
class Zero:
    """What of DeepSpeed's ZeRO settings matters for a plan; numbers of elements where DeepSpeed has them.

    Attributes:
        hpz: ranks of a secondary partition, 1 for none. quantized_weights, quantized_gradients: ZeRO++'s.
        overlaps: whether gradients are reduced while the backward pass goes on.
        optimizer_on, weights_on: "none" for the GPU, "cpu" or "nvme".
    """

    stage: int
    reduce_bucket: int
    gather_bucket: int
    sub_group: int
    prefetch_bucket: int
    persistence: int
    max_live: int
    hpz: int
    quantized_weights: bool
    quantized_gradients: bool
    overlaps: bool
    optimizer_on: str
    weights_on: str


def zero_of(stage: int, settings: Mapping[str, Any]) -> Zero:
    """The settings of `deepspeed.zero_optimization`, with DeepSpeed's defaults where they say nothing."""

    def number(key: str) -> int:
        return int(settings.get(key, ZERO_DEFAULTS[key]))

    def device(key: str) -> str:
        return str((settings.get(key) or {}).get("device", "none"))

    overlaps = settings.get("overlap_comm")
    return Zero(
        stage=stage,
        reduce_bucket=number("reduce_bucket_size"),
        gather_bucket=number("allgather_bucket_size"),
        sub_group=number("sub_group_size"),
        prefetch_bucket=number("stage3_prefetch_bucket_size"),
        persistence=number("stage3_param_persistence_threshold"),
        max_live=number("stage3_max_live_parameters"),
        hpz=number("zero_hpz_partition_size"),
        quantized_weights=bool(settings.get("zero_quantized_weights", False)),
        quantized_gradients=bool(settings.get("zero_quantized_gradients", False)),
        overlaps=stage == 3 if overlaps is None else bool(overlaps),
        optimizer_on=device("offload_optimizer"),
        weights_on=device("offload_param"),
    )


@dataclass(frozen=True)
class StateMemory:
    """Bytes on each GPU, and in the memory (or on the NVMe) of its host for each GPU.

    Attributes:
        weights: this rank's part. secondary: its part of hpZ's second copy. gradients: as they are accumulated.
        optimizer: float32 weights and moments. gathered: weights of others while they are used (ZeRO-3).
        buckets: what gradients and weights are sent from. step: float32 gradients during the optimizer's step.
        host: what is offloaded.
    """

    weights: int
    secondary: int
    gradients: int
    optimizer: int
    gathered: int
    buckets: int
    step: int
    host: int


def state_memory(parameters: Parameters, zero: Zero, ranks: int, element: int) -> StateMemory:
    """What the states of a run need.

    Args:
        element: bytes of an element of weights, gradients and activations.
    """
    total = parameters.total
    share = -(-total // ranks)
    whole = parameters.gains if parameters.gains // (2 * parameters.n_layers + 1) <= zero.persistence else 0
    weights = share * element if zero.stage == 3 else total * element
    # From stage 2 on each rank keeps the sums of its own part; before, all of them until the step.
    gradients = (share if zero.stage >= 2 else total) * element
    optimizer = (share if zero.stage >= 1 else total) * _FP32 * (1 + _ADAM_STATES)
    if zero.stage == 0 and element == _FP32:
        optimizer -= total * _FP32  # the weights themselves are stepped
    step = min(share, zero.sub_group) * _FP32 if zero.stage else (total * _FP32 if element != _FP32 else 0)
    host = 0
    if zero.optimizer_on != "none":
        host, optimizer, step = optimizer + share * _FP32, 0, 0
        gradients = gradients if zero.stage < 3 else 0
    if zero.weights_on != "none":
        host, weights = host + weights, 0
    return StateMemory(
        weights=weights + (whole * element if zero.stage == 3 else 0),
        secondary=-(-total // zero.hpz) * element if zero.hpz > 1 else 0,
        gradients=gradients,
        optimizer=optimizer,
        gathered=_gathered(parameters, zero) * element if ranks > 1 and zero.stage == 3 else 0,
        buckets=_buckets(parameters, zero) * element if zero.stage else 0,
        step=step,
        host=host,
    )


def _gathered(parameters: Parameters, zero: Zero) -> int:
    """Weights held whole at most: what is in use, fetched ahead, or soon used again."""
    least = max(parameters.embeddings, parameters.layer) + zero.prefetch_bucket
    return min(parameters.total, max(zero.max_live, least))


def _buckets(parameters: Parameters, zero: Zero) -> int:
    filled = min(parameters.total, zero.reduce_bucket)
    if zero.stage == 3:
        return zero.reduce_bucket + filled  # the bucket, and what is scattered from it
    return zero.reduce_bucket * (2 if zero.overlaps else 1) + min(parameters.total, zero.gather_bucket)
