"""The only place that configures DeepSpeed."""

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import BaseModel, ValidationError
from torch import nn

from data_pipeline.stream import Batch
from tidal_dist.config import Config, TrainingConfig
from tidal_dist.errors import ConfigError, UserError
from tidal_dist.model.compiled import compile_layers
from tidal_dist.model.transformer import Checkpoint, Layer, TidalTransformer
from tidal_dist.training.collectives import is_lost_contact, record_collectives, watch_collectives
from tidal_dist.training.heartbeat import HEARTBEATS
from tidal_dist.training.interrupts import LostRanks
from tidal_dist.training.loss import loss_scale
from tidal_dist.training.passthrough import Asked, Precision, deepspeed_settings, refusal
from tidal_dist.training.phases import Phases

T = TypeVar("T")


@contextmanager
def process_group(config: TrainingConfig, run: Path) -> Iterator[tuple[int, int]]:
    """Join the other ranks (NCCL on GPUs, gloo on CPUs); (rank, world size). Sets the CPU threads of this rank.

    Raises:
        LostRanks: another rank did not come, has ended, or took longer than `collective_timeout_minutes`.
    """
    # DeepSpeed calls them, and nobody who reads the log can change that.
    warnings.filterwarnings("ignore", r".*(all_gather_into|reduce_scatter)_tensor. is deprecated", FutureWarning)
    if get_accelerator().device_name() == "cpu":
        # On CPUs DeepSpeed would compile, for up to a minute, an all-reduce that only its inference engine calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
        torch.set_num_threads(config.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // local_ranks))
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
    watch_collectives(run / HEARTBEATS)
    timeout = timedelta(minutes=config.collective_timeout_minutes)
    try:
        deepspeed.init_distributed(get_accelerator().communication_backend_name(), verbose=False, timeout=timeout)
        try:
            yield dist.get_rank(), dist.get_world_size()
            dist.barrier()
        finally:
            deepspeed.comm.destroy_process_group()
    except RuntimeError as error:
        if not is_lost_contact(error):
            raise
        record_collectives(run / HEARTBEATS)
        raise LostRanks(" ".join(str(error).split())) from error


def device() -> torch.device:
    """The device of this rank."""
    return torch.device(get_accelerator().current_device_name())


def synchronize() -> None:
    """Wait until the device has done what it was asked for."""
    get_accelerator().synchronize()


def uses_pinned_memory() -> bool:
    """Whether batches are copied to a device."""
    return get_accelerator().device_name() != "cpu"


def uses_bf16(config: TrainingConfig) -> bool:
    """Whether weights and activations are bf16."""
    if config.precision == "auto":
        return get_accelerator().device_name() != "cpu"
    return config.precision == "bf16"


def precision(config: TrainingConfig) -> Precision:
    """Of weights and activations."""
    return "bf16" if uses_bf16(config) else "fp32"


def deepspeed_config(config: Config, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration: what our own fields decide, and what the `deepspeed` section passes through.

    Raises:
        ConfigError: the section contradicts one of our own fields, or DeepSpeed does not know what it says.
    """
    settings = deepspeed_settings(config, world, precision(config.training))
    asked = Asked(settings)
    try:
        DeepSpeedConfig(asked)
    except ValidationError as error:
        fields = next((m.model_fields for m in _sections() if m.__name__ == error.title), {})
        known = [name for key, info in fields.items() for name in (info.alias or key,)]
        raise ConfigError(refusal(config.deepspeed, error.errors()[0], known)) from None
    except (AssertionError, ValueError, TypeError, DeepSpeedConfigError) as error:
        raise ConfigError(f"deepspeed: refused by DeepSpeed {deepspeed.__version__}: {error}") from None
    asked.check(config.deepspeed)
    return settings


def _sections(kind: type[BaseModel] = DeepSpeedConfigModel) -> Iterator[type[BaseModel]]:
    """DeepSpeed's own models of its sections."""
    for section in kind.__subclasses__():
        yield section
        yield from _sections(section)


def layout(config: Config, world: int) -> dict[str, Any]:
    """What a checkpoint's files depend on: how the ranks share weights and optimizer, and in which precision."""
    settings = deepspeed_config(config, world)
    zero = settings["zero_optimization"]
    return {"ranks": world if zero["stage"] else None, "zero_optimization": zero, "bf16": uses_bf16(config.training)}


def activation_checkpoint(config: TrainingConfig) -> Checkpoint | None:
    """The function that runs a layer and keeps only its input, in host memory if so configured, or none."""
    return deepspeed.checkpointing.checkpoint if config.activation_checkpointing else None


def build_engine(config: Config, world: int, build_model: Callable[[], TidalTransformer]) -> Any:
    """A DeepSpeed engine around the model, with AdamW; under ZeRO-3 the weights are partitioned as they are made.

    Raises:
        ConfigError: the `deepspeed` section cannot be followed.
    """
    settings = deepspeed_config(config, world)
    _import_muon_uncompiled()
    # On a CPU everything lies in host memory, and DeepSpeed would lose what it takes for a copy.
    on_host = config.training.activation_checkpoints_on_cpu and get_accelerator().device_name() != "cpu"
    deepspeed.checkpointing.configure(None, deepspeed_config=settings, checkpoint_in_cpu=on_host)
    torch.manual_seed(config.training.seed)
    with _followed(config.deepspeed):
        partitioned = deepspeed.zero.Init(config_dict_or_path=settings, enabled=config.training.zero_stage == 3)
    with partitioned:
        model = build_model()
    if config.training.compile:
        # Under ZeRO-3 a layer's weights then come and go together, outside of what is compiled.
        deepspeed.utils.set_z3_leaf_modules(model, [Layer])
        compile_layers(model, in_training_only=True)
    groups = _parameter_groups(model, config.training.weight_decay)
    # An optimizer of DeepSpeed's own: fused on GPUs, on the CPU where its state is offloaded.
    ours = [] if "optimizer" in settings else [_adamw(groups, config.training)]
    built = {"optimizer": ours[0]} if ours else {"model_parameters": groups}
    # In bf16 without ZeRO, DeepSpeed makes a first step, without gradients, which weight decay and Adam would count.
    with _followed(config.deepspeed), _withheld(ours):
        engine, *_ = deepspeed.initialize(model=model, config=settings, **built)
    return engine


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, which it compares every optimizer with, without PyTorch's compiler behind it.

    Its functions are decorated with `torch.compile`, and importing the compiler takes each rank two seconds at every
    start; who asks for Muon gets it uncompiled.
    """
    compile_function = torch.compile
    torch.compile = lambda *_, **__: lambda function: function  # type: ignore[assignment]
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    except ImportError:  # releases before it, and after it
        pass
    finally:
        torch.compile = compile_function


@contextmanager
def _followed(section: dict[str, Any]) -> Iterator[None]:
    """Around what DeepSpeed does by a `deepspeed` section; errors, such as of kernels that are missing, name it."""
    try:
        yield
    except (AssertionError, AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        if not section:
            raise
        raise ConfigError(f"deepspeed={section!r}: cannot be followed here: {type(error).__name__}: {error}") from error


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, with weight decay; embeddings and gains, without."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    decayed = [p for p in model.parameters() if id(p) in linear]
    others = [p for p in model.parameters() if id(p) not in linear]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _adamw(groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def pass_batches(engine: Any, batches: list[Batch], phases: Phases) -> tuple[float, int]:
    """Forward and backward over this rank's micro-batches, the optimizer's step withheld: `apply_step` makes it.

    DeepSpeed averages gradients over the ranks, which `loss_scale` reckons with.

    Returns:
        Nats per label and number of labels of the global batch. Without labels there is nothing to pass and no step
        to apply: Adam would move the weights by its moments and their decay.
    """
    with phases("agree"):
        scale, labels = loss_scale(sum(b.label_count() for b in batches), dist.get_world_size(), all_sum)
    if not labels:
        return 0.0, 0
    nats = 0.0
    for i, batch in enumerate(batches):
        if i:
            engine.step()  # of the micro-batch before: counts it, changes no weight
        with phases("forward"):
            batch = batch.to(device())
            loss = engine(batch.tokens, batch.chars, batch.labels)
        with phases("backward"):
            engine.backward(loss * scale, scale_wrt_gas=False)
            nats += loss.item()
    with phases("agree"):
        return all_sum(nats) / max(labels, 1), labels


def apply_step(engine: Any, learning_rate: float, phases: Phases) -> None:
    """The optimizer's step with the gradients of `pass_batches`."""
    with phases("optimizer"):
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
        engine.step()


def discard_step(engine: Any) -> None:
    """Drop the gradients of `pass_batches`: weights, moments and counters stay as they were, and the next step can
    begin.

    DeepSpeed's own step does it, which knows what becomes of its buffers in every stage; the optimizer inside it, and
    what it counts, are kept from noticing.
    """
    counters = {name: getattr(engine, name) for name in ("global_steps", "global_samples", "skipped_steps")}
    scaler = getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)
    scaling = dict(vars(scaler)) if scaler is not None else {}
    inner = [getattr(engine.optimizer, name, None) for name in ("optimizer", "backup_optimizer")]
    with _withheld([engine.basic_optimizer, *(optimizer for optimizer in inner if optimizer is not None)]):
        engine.step()
    vars(engine).update(counters)
    if scaler is not None:
        vars(scaler).update(scaling)


@contextmanager
def _withheld(optimizers: list[torch.optim.Optimizer]) -> Iterator[None]:
    """While these optimizers make no steps."""
    kept = [(optimizer, vars(optimizer).get("step")) for optimizer in {id(o): o for o in optimizers}.values()]
    for optimizer, _ in kept:
        vars(optimizer)["step"] = lambda *_, **__: None
    try:
        yield
    finally:
        for optimizer, step in kept:
            del vars(optimizer)["step"]
            if step is not None:
                vars(optimizer)["step"] = step


def device_name() -> str:
    """The product name of this rank's device, "cpu" for a CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else get_accelerator().device_name()


def peak_memory() -> dict[str, float]:
    """The most GiB of this rank's device since the last call: in use, and set aside by PyTorch; {} on a CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return {}
    peaks = {
        "memory/device_allocated_peak_gib": accelerator.max_memory_allocated() / 2**30,
        "memory/device_reserved_peak_gib": accelerator.max_memory_reserved() / 2**30,
    }
    accelerator.reset_peak_memory_stats()
    return peaks


def agree(**flags: bool) -> dict[str, bool]:
    """Which flags are set on any rank, in one exchange."""
    total = torch.tensor([float(flag) for flag in flags.values()], device=device())
    dist.all_reduce(total)
    return {name: count > 0 for name, count in zip(flags, total.tolist(), strict=True)}


def all_sum(value: float) -> float:
    """The sum of a number over all ranks, in float64."""
    total = torch.tensor(value, dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return total.item()


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
