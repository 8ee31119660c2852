"""`tidal plan`: what a run would need and cost on a cluster, before anything is rented."""

from dataclasses import dataclass

from tidal_dist.config import Config
from tidal_dist.errors import ConfigError
from tidal_dist.flops import RowFlops, recomputed_layers, row_flops
from tidal_dist.planning.activations import PassMemory, PassShape, pass_memory
from tidal_dist.planning.cluster import Assumptions, Cluster, Precision, Rows, precision_of, rows_of
from tidal_dist.planning.communication import Collective, collectives
from tidal_dist.planning.content import RowContent, row_content
from tidal_dist.planning.parameters import Parameters, parameters
from tidal_dist.planning.states import StateMemory, Zero, state_memory, zero_of
from tidal_dist.training.passthrough import deepspeed_settings

ELEMENT_BYTES = {"fp32": 4, "bf16": 2}
_ADAM_BYTES = 28  # read and written by a step, for each parameter: float32 gradient, weight, two moments


@dataclass(frozen=True)
class Plan:
    """A run on a cluster, on paper.

    Attributes:
        flops: of a row. hardware_flops: that a GPU computes in a step. collectives: exchanges of a step.
        compute_seconds, optimizer_seconds, communication_seconds: of a step; `exposed_seconds` of the last do not
            hide behind the first.
    """

    cluster: Cluster
    assumed: Assumptions
    precision: Precision
    rows: Rows
    content: RowContent
    parameters: Parameters
    zero: Zero
    flops: RowFlops
    hardware_flops: int
    states: StateMemory
    activations: PassMemory
    collectives: list[Collective]
    compute_seconds: float
    optimizer_seconds: float
    communication_seconds: float
    exposed_seconds: float

    @property
    def step_seconds(self) -> float:
        """Of a step."""
        return self.compute_seconds + self.optimizer_seconds + self.exposed_seconds

    @property
    def peak_flops(self) -> float:
        """Of one GPU, in FLOPs a second."""
        return (self.cluster.gpu.tflops(self.precision) or 0.0) * 1e12

    @property
    def utilisation(self) -> float:
        """Model FLOPs of a step as a share of what all GPUs could compute meanwhile (MFU)."""
        return self.flops.training * self.rows.rank / (self.step_seconds * self.peak_flops)

    def memory(self) -> dict[str, float]:
        """Bytes on each GPU, by part."""
        states, passes = self.states, self.activations
        loose = passes.total + states.gathered + states.buckets + states.step
        return {
            "weights": states.weights + states.secondary,
            "gradients": states.gradients,
            "optimizer": states.optimizer,
            "activations": passes.kept + passes.embeddings,
            "layer at work": passes.working,
            "attention biases": passes.biases,
            "logits": passes.logits,
            "gathered weights": states.gathered,
            "communication buckets": states.buckets,
            "gradients in float32": states.step,
            "fragmentation": loose * self.assumed.fragmentation,
            "CUDA and NCCL": self.assumed.context_gb * 1e9,
        }

    @property
    def memory_bytes(self) -> float:
        """On each GPU at most."""
        return sum(self.memory().values())

    @property
    def fits(self) -> bool:
        """Whether it fits into the GPU's memory."""
        return self.memory_bytes <= self.cluster.gpu.memory_gb * 1e9


def plan(config: Config, cluster: Cluster, assumed: Assumptions, content: RowContent | None = None) -> Plan:
    """What the run needs on the cluster.

    Args:
        content: of the rows; none: looked up (`row_content`).

    Raises:
        UserError: the run cannot be laid out on this many GPUs, or the GPU lacks the precision.
    """
    if config.model.is_baseline:
        raise ConfigError("model.writes and model.char_order: a baseline, of which nothing is reckoned; leave them out")
    training = config.training
    precision = precision_of(config, cluster.gpu)
    rows = rows_of(config, cluster.ranks)
    settings = deepspeed_settings(config, cluster.ranks, precision)
    zero = zero_of(training.zero_stage, settings["zero_optimization"])
    content = content or row_content(config)
    element, max_block_bytes = ELEMENT_BYTES[precision], config.segmentation.max_block_bytes
    counted = parameters(config.model, content.vocab_size, max_block_bytes)
    flops = row_flops(
        config.model, config.data.row_tokens, config.data.row_chars, max_block_bytes, round(content.labels)
    )
    recomputed = recomputed_layers(config.model, training)
    shape = pass_shape(config, rows.micro, content, element)
    activations = pass_memory(shape, recomputed, training.activation_checkpoints_on_cpu)
    exchanges = collectives(counted, zero, cluster, rows.passes, element)
    hardware = flops.hardware(recomputed) * rows.rank
    compute = max(_compute_seconds(flops, hardware, cluster, precision, assumed), _host_seconds(config, rows, assumed))
    communication = sum(c.seconds(cluster, assumed) for c in exchanges)
    return Plan(
        cluster=cluster,
        assumed=assumed,
        precision=precision,
        rows=rows,
        content=content,
        parameters=counted,
        zero=zero,
        flops=flops,
        hardware_flops=hardware,
        states=state_memory(counted, zero, cluster.ranks, element),
        activations=activations,
        collectives=exchanges,
        compute_seconds=compute,
        optimizer_seconds=_optimizer_seconds(counted, zero, cluster, assumed),
        communication_seconds=communication,
        exposed_seconds=max(communication - assumed.overlap * compute, 0.0),
    )


def pass_shape(config: Config, rows: int, content: RowContent, element: int, fused_norms: bool = True) -> PassShape:
    """One forward and backward pass over `rows` rows."""
    data = config.data
    longest_run = config.segmentation.max_block_bytes + 1
    labels = round(content.labels)
    sizes = data.row_tokens, data.row_chars, longest_run, labels, element
    kernel = config.training.attention
    kernel = ("flex" if fused_norms else "split") if kernel == "auto" else kernel
    return PassShape(config.model, rows, *sizes, fused_norms, kernel)


def _compute_seconds(
    flops: RowFlops, hardware: int, cluster: Cluster, precision: Precision, assumed: Assumptions
) -> float:
    """Time of forward and backward passes: matrix products and attention, each at its share of the peak."""
    parts = flops.parts()
    attention = sum(parts[name] for name in parts if "attention" in name) / sum(parts.values())
    peak = (cluster.gpu.tflops(precision) or 0.0) * 1e12
    return hardware * (attention / assumed.attention_share + (1 - attention) / assumed.matmul_share) / peak


def _host_seconds(config: Config, rows: Rows, assumed: Assumptions) -> float:
    """Time in which the host starts all kernels of a step."""
    return rows.passes * config.model.n_layers * assumed.layer_seconds


def _optimizer_seconds(counted: Parameters, zero: Zero, cluster: Cluster, assumed: Assumptions) -> float:
    """Time of AdamW over this rank's part; offloaded, of moving gradients down and weights up."""
    share = counted.total / (cluster.ranks if zero.stage else 1)
    if zero.optimizer_on != "none":
        return share * 4 / (assumed.host_gb_per_second * 1e9)
    return share * _ADAM_BYTES / (cluster.gpu.memory_gb_per_second * 1e9 * assumed.memory_rate_share)
