"""What could be set otherwise where a plan does not fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tidal_dist.config import Config, TrainingConfig
from tidal_dist.plan import Plan, plan
from tidal_dist.planning.cluster import Cluster

_WORTH_IT = 0.98  # of the memory that is left by a change that is named
_SMALL_BUCKET = 50_000_000
_MOST_NODES = 8  # times as many


@dataclass(frozen=True)
class Change:
    """Something that could be set otherwise, and what a GPU would then hold."""

    text: str
    memory_bytes: float
    step_seconds: float
    fits: bool


def changes(config: Config, made: Plan) -> list[Change]:
    """What could be set otherwise where a plan does not fit, and what each change alone would bring; best first."""
    found = []
    for text, changed, cluster in _variations(config, made):
        other = plan(changed, cluster, made.assumed, made.content)
        if other.memory_bytes < _WORTH_IT * made.memory_bytes:
            found.append(Change(text, other.memory_bytes, other.step_seconds, other.fits))
    return sorted(found, key=lambda c: (not c.fits, c.step_seconds if c.fits else c.memory_bytes))


def _variations(config: Config, made: Plan) -> Iterator[tuple[str, Config, Cluster]]:
    training, cluster = config.training, made.cluster

    def with_training(**values: Any) -> Config:
        content = training.model_dump() | values
        return config.model_copy(update={"training": TrainingConfig.model_validate(content)})

    def with_zero(**values: Any) -> Config:
        zero = config.deepspeed.get("zero_optimization", {}) | values
        return config.model_copy(update={"deepspeed": config.deepspeed | {"zero_optimization": zero}})

    if not training.activation_checkpointing or training.activation_checkpoint_every_layers > 1:
        every = with_training(activation_checkpointing=True, activation_checkpoint_every_layers=1)
        yield "training.activation_checkpointing=true, of every layer", every, cluster
    for passes in range(2, made.rows.rank + 1):
        if made.rows.rank % passes == 0 and passes > training.accumulation_steps:
            rows = made.rows.rank // passes
            yield (
                f"training.accumulation_steps={passes}: {rows} rows a pass",
                with_training(accumulation_steps=passes),
                cluster,
            )
    if training.activation_checkpointing and not training.activation_checkpoints_on_cpu:
        yield "training.activation_checkpoints_on_cpu=true", with_training(activation_checkpoints_on_cpu=True), cluster
    for stage in range(training.zero_stage + 1, 4):
        yield f"training.zero_stage={stage}", with_training(zero_stage=stage), cluster
    if made.zero.stage and made.zero.optimizer_on == "none":
        yield (
            "deepspeed.zero_optimization.offload_optimizer={device: cpu}",
            with_zero(offload_optimizer={"device": "cpu"}),
            cluster,
        )
    if made.zero.stage and made.zero.reduce_bucket > _SMALL_BUCKET:
        buckets = {"reduce_bucket_size": _SMALL_BUCKET, "allgather_bucket_size": _SMALL_BUCKET}
        yield "deepspeed.zero_optimization.reduce_bucket_size=5e7 (and allgather)", with_zero(**buckets), cluster
    for nodes in range(cluster.nodes + 1, _MOST_NODES * cluster.nodes + 1):
        ranks = nodes * cluster.gpus_per_node
        if config.data.lanes % ranks == 0 and training.batch_rows % (ranks * training.accumulation_steps) == 0:
            yield f"{nodes} nodes, {ranks} GPUs", config, replace(cluster, nodes=nodes)
