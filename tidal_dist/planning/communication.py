"""What each GPU sends and receives in a step, over NVLink and over the network.

Volumes are those of ring algorithms, which cross the network once for each node: gathering M bytes over W ranks on n
nodes moves M (W - 1) / W bytes through each GPU's link, and brings M (n - 1) / n bytes into each node, over the network
ports of all its GPUs together. Quantised weights are sent as int8, quantised gradients as int4 (ZeRO++, Wang et al.
2023).
"""

import math
from dataclasses import dataclass

from tidal_dist.planning.cluster import Assumptions, Cluster
from tidal_dist.planning.parameters import Parameters
from tidal_dist.planning.states import Zero


@dataclass(frozen=True)
class Collective:
    """One kind of exchange in a step.

    Attributes:
        name: what it does. link_bytes: through each GPU's link. network_bytes: through each GPU's network port.
        count: calls in a step. ranks: that take part in each.
    """

    name: str
    link_bytes: float
    network_bytes: float
    count: int
    ranks: int

    def seconds(self, cluster: Cluster, assumed: Assumptions) -> float:
        """Time of the slower of both ways, and of the latency of every call."""
        link = self.link_bytes / (cluster.gpu.link_gb_per_second * 1e9 * assumed.link_share)
        network = self.network_bytes / (assumed.network_gb_per_second * 1e9 * assumed.link_share)
        return max(link, network) + self.count * assumed.collective_seconds * math.log2(max(self.ranks, 1))


def collectives(parameters: Parameters, zero: Zero, cluster: Cluster, passes: int, element: int) -> list[Collective]:
    """The exchanges of weights and gradients in a step of `passes` forward and backward passes on each rank."""
    if cluster.ranks == 1:
        return []
    weights = parameters.total * element
    sent = weights / element if zero.quantized_weights else weights
    everywhere = (cluster.nodes, cluster.gpus_per_node)
    modules = parameters.n_layers + 3
    buckets = max(1, math.ceil(parameters.total / zero.reduce_bucket))
    if zero.stage == 3:
        second = _within(zero.hpz, cluster) if zero.hpz > 1 else everywhere
        return [
            _exchange("gather weights, forward", sent, everywhere, passes, modules),
            _exchange("gather weights, backward", weights if zero.hpz > 1 else sent, second, passes, modules),
            _scatter(zero, weights, everywhere, passes, buckets, element),
        ]
    if zero.stage == 0:
        return [_exchange("all-reduce gradients", 2 * weights, everywhere, 1, buckets)]
    reductions = passes if zero.stage == 2 else 1
    gathers = max(1, math.ceil(parameters.total / max(zero.gather_bucket, 1)))
    return [
        _scatter(zero, weights, everywhere, reductions, buckets, element),
        _exchange("gather new weights", weights, everywhere, 1, gathers),
    ]


def _within(ranks: int, cluster: Cluster) -> tuple[int, int]:
    """Nodes, and GPUs on each, that a group of consecutive ranks spans."""
    return max(1, ranks // cluster.gpus_per_node), min(ranks, cluster.gpus_per_node)


def _exchange(name: str, size: float, among: tuple[int, int], times: int, calls: int) -> Collective:
    nodes, gpus = among
    ranks = nodes * gpus
    link = times * size * (ranks - 1) / ranks if gpus > 1 else 0.0
    network = times * size * (nodes - 1) / nodes / gpus
    return Collective(name, link, network, times * calls, ranks)


def _scatter(zero: Zero, size: float, among: tuple[int, int], times: int, calls: int, element: int) -> Collective:
    name = "reduce gradients"
    if not zero.quantized_gradients:
        return _exchange(name, size, among, times, calls)
    # First inside each node, then what is left between nodes, both in 4 bits.
    nodes, gpus = among
    size = size / (2 * element)
    link = times * size * (gpus - 1) / gpus
    return Collective(name, link, times * size / gpus * (nodes - 1) / nodes, 2 * times * calls, nodes * gpus)
