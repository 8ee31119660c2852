"""The only place that configures DeepSpeed."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from data_pipeline.stream import Batch
from tidal_dist.config import Config, TrainingConfig
from tidal_dist.errors import ConfigError, UserError
from tidal_dist.model.transformer import Checkpoint
from tidal_dist.training.loss import loss_scale

T = TypeVar("T")


@contextmanager
def process_group(config: TrainingConfig) -> Iterator[tuple[int, int]]:
    """Join the other ranks (NCCL on GPUs, gloo on CPUs); (rank, world size). Sets the CPU threads of this rank."""
    # DeepSpeed calls them, and nobody who reads the log can change that.
    warnings.filterwarnings("ignore", r".*(all_gather_into|reduce_scatter)_tensor. is deprecated", FutureWarning)
    if get_accelerator().device_name() == "cpu":
        # On CPUs DeepSpeed would compile, for up to a minute, an all-reduce that only its inference engine calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
        torch.set_num_threads(config.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // local_ranks))
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
    deepspeed.init_distributed(get_accelerator().communication_backend_name(), verbose=False)
    try:
        yield dist.get_rank(), dist.get_world_size()
        dist.barrier()
    finally:
        deepspeed.comm.destroy_process_group()


def device() -> torch.device:
    """The device of this rank."""
    return torch.device(get_accelerator().current_device_name())


def uses_pinned_memory() -> bool:
    """Whether batches are copied to a device."""
    return get_accelerator().device_name() != "cpu"


def uses_bf16(config: TrainingConfig) -> bool:
    """Whether weights and activations are bf16."""
    if config.precision == "auto":
        return get_accelerator().device_name() != "cpu"
    return config.precision == "bf16"


def deepspeed_config(config: Config, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration: what our own fields decide, and what the `deepspeed` section passes through.

    Raises:
        ConfigError: the section contradicts one of our own fields.
    """
    training = config.training
    micro_rows = training.batch_rows // world // training.accumulation_steps
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_rows,
        "gradient_accumulation_steps": training.accumulation_steps,
        "gradient_clipping": training.max_gradient_norm,
        "bf16": {"enabled": uses_bf16(training)},
        "zero_optimization": {"stage": training.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
    return _merged(ours, config.deepspeed, "deepspeed")


def _merged(ours: dict[str, Any], theirs: dict[str, Any], path: str) -> dict[str, Any]:
    result = dict(ours)
    for key, value in theirs.items():
        if isinstance(value, dict) and isinstance(ours.get(key), dict):
            result[key] = _merged(ours[key], value, f"{path}.{key}")
        elif key in ours and ours[key] != value:
            raise ConfigError(f"{path}.{key}={value!r} contradicts what training.* sets ({ours[key]!r}); set it there")
        else:
            result[key] = value
    return result


def activation_checkpoint(config: TrainingConfig) -> Checkpoint | None:
    """The function that runs a layer and keeps only its input, or none."""
    return deepspeed.checkpointing.checkpoint if config.activation_checkpointing else None


def build_engine(config: Config, world: int, build_model: Callable[[], nn.Module]) -> Any:
    """A DeepSpeed engine around the model, with AdamW; under ZeRO-3 the weights are partitioned as they are made."""
    settings = deepspeed_config(config, world)
    torch.manual_seed(config.training.seed)
    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=config.training.zero_stage == 3):
        model = build_model()
    engine, *_ = deepspeed.initialize(model=model, optimizer=_optimizer(model, config.training), config=settings)
    return engine


def _optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices; embeddings and gains have none."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    decayed = [p for p in model.parameters() if id(p) in linear]
    others = [p for p in model.parameters() if id(p) not in linear]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def train_step(engine: Any, batches: list[Batch], learning_rate: float) -> tuple[float, int, float]:
    """One optimizer step on this rank's micro-batches: global loss in nats per label, labels, gradient norm.

    DeepSpeed averages gradients over the ranks, which `loss_scale` reckons with.
    """
    scale, labels = loss_scale(sum(b.label_count() for b in batches), dist.get_world_size(), all_sum)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    nats = 0.0
    for batch in batches:
        batch = batch.to(device())
        loss = engine(batch.tokens, batch.chars, batch.labels)
        engine.backward(loss * scale, scale_wrt_gas=False)
        nats += loss.item()
        engine.step()
    return all_sum(nats) / max(labels, 1), labels, float(engine.get_global_grad_norm() or 0.0)


def all_sum(value: float) -> float:
    """The sum of a number over all ranks, in float64."""
    total = torch.tensor(value, dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return total.item()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return all_sum(float(flag)) > 0


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(action: Callable[[], T]) -> T:
    """What the action returns on this rank.

    Raises:
        UserError: on any rank; raised on all of them, so that none waits for another.
    """
    outcome: T | UserError
    try:
        outcome = action()
    except UserError as error:
        outcome = error
    for problem in gather_objects(outcome if isinstance(outcome, UserError) else None):
        if problem is not None:
            raise problem
    return cast(T, outcome)


def from_first_rank(action: Callable[[], T]) -> T:
    """What the action returns on rank 0, which alone does it."""
    value = together(lambda: action() if dist.get_rank() == 0 else None)
    return gather_objects(value)[0]
