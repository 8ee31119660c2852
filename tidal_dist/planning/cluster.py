"""The machines that a run is planned for, what is assumed of them, and how its rows fall on them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tidal_dist.config import Config
from tidal_dist.errors import ConfigError
from tidal_dist.gpus import Gpu

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines of `gpus_per_node` equal GPUs."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu

    @property
    def ranks(self) -> int:
        """One for each GPU."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes for granted. Nothing of it was measured on a GPU: set what you know of your cluster.

    Attributes:
        matmul_share, attention_share: of the GPU's peak that matrix products and attention under a mask reach.
        memory_rate_share: of the GPU's memory rate that element-wise kernels reach.
        overlap: share of the computing behind which communication can hide.
        link_share: of NVLink's and the network's nominal rate that collectives reach.
        network_gb_per_second: of one node to the others, in one direction, for each of its GPUs.
        host_gb_per_second: between a GPU and its host's memory.
        collective_seconds: of latency in a collective, for each doubling of the ranks.
        layer_seconds: that the host needs to start a layer's kernels forward and backward; a GPU that is done sooner
            waits.
        context_gb: CUDA context, libraries and NCCL's buffers on each GPU.
        fragmentation: of activations and buffers that the allocator holds beyond what is asked for.
    """

    matmul_share: float = 0.6
    attention_share: float = 0.3
    memory_rate_share: float = 0.7
    overlap: float = 0.8
    link_share: float = 0.75
    network_gb_per_second: float = 50.0
    host_gb_per_second: float = 25.0
    collective_seconds: float = 10e-6
    layer_seconds: float = 1e-3
    context_gb: float = 2.5
    fragmentation: float = 0.1

    def as_text(self) -> list[str]:
        """One line for each group of assumptions."""
        return [
            f"of the peak, matrix products reach {self.matmul_share:.0%}, attention under a mask "
            f"{self.attention_share:.0%}; element-wise kernels reach {self.memory_rate_share:.0%} of the memory's rate",
            f"network {self.network_gb_per_second:g} GB/s a GPU; collectives reach {self.link_share:.0%} of it and of "
            f"NVLink, and hide behind {self.overlap:.0%} of the computing; "
            f"{self.collective_seconds * 1e6:g} us of latency for each doubling of the ranks",
            f"the host needs {self.layer_seconds * 1e3:g} ms to start a layer, forward and backward: small models "
            f"wait for it",
            f"GPU to host memory {self.host_gb_per_second:g} GB/s; {self.context_gb:g} GB of CUDA and NCCL on each "
            f"GPU; the allocator holds {self.fragmentation:.0%} more than activations and buffers need",
        ]


@dataclass(frozen=True)
class Rows:
    """How the rows of a step fall on the ranks.

    Attributes:
        step: of a step. rank: of a step, on each rank. micro: of one of its passes. passes: of a step, on each rank.
    """

    step: int
    rank: int
    micro: int
    passes: int


def rows_of(config: Config, ranks: int) -> Rows:
    """The rows of a run on `ranks` ranks.

    Raises:
        ConfigError: lanes, batch and ranks do not divide each other as training needs; names numbers that do.
    """
    training, lanes = config.training, config.data.lanes
    if training.batch_rows % lanes:
        raise ConfigError(f"training.batch_rows={training.batch_rows} is not a multiple of data.lanes={lanes}")
    if lanes % ranks:
        raise ConfigError(
            f"{ranks} GPUs do not divide data.lanes={lanes}: each reads equally many lanes; "
            f"{_near(ranks, (n for n in range(1, lanes + 1) if lanes % n == 0))} GPUs do, or set data.lanes"
        )
    if training.batch_rows % (ranks * training.accumulation_steps):
        rows = training.batch_rows // ranks
        raise ConfigError(
            f"training.accumulation_steps={training.accumulation_steps} does not divide the {rows} rows of a GPU "
            f"(training.batch_rows={training.batch_rows} on {ranks} GPUs)"
        )
    rank = training.batch_rows // ranks
    return Rows(training.batch_rows, rank, rank // training.accumulation_steps, training.accumulation_steps)


def _near(wanted: int, possible: Iterable[int]) -> str:
    """The nearest numbers below and above."""
    numbers = sorted(possible)
    near = [
        max((n for n in numbers if n < wanted), default=None),
        min((n for n in numbers if n > wanted), default=None),
    ]
    return " or ".join(str(n) for n in near if n is not None)


def precision_of(config: Config, gpu: Gpu) -> Precision:
    """What `training.precision` is on this GPU.

    Raises:
        ConfigError: the GPU does not have it.
    """
    precision: Precision = "fp32" if config.training.precision == "fp32" else "bf16"
    if gpu.tflops(precision) is None:
        raise ConfigError(f"training.precision: {gpu.name} has no {precision}; set training.precision=fp32")
    return precision
