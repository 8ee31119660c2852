"""What the `deepspeed` section may say: what our own fields do not decide. Pure functions, without DeepSpeed."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tidal_dist.config import Config
from tidal_dist.errors import ConfigError

Precision = Literal["fp32", "bf16"]

# What DeepSpeed would do of its own accord, and a run may change.
_DEFAULTS = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 1_000_000_000,
}
# Of this section DeepSpeed asks for single keys, and then takes it whole, when it refuses keys that it does not know.
_JUDGED_BY_DEEPSPEED = {"deepspeed.zero_optimization"}
_WITH_BETAS = {"adam", "adamw", "lamb", "lion"}


@dataclass(frozen=True)
class Decided:
    """A key of DeepSpeed's that a field of ours decides.

    Attributes:
        path: dotted, in the `deepspeed` section. value: what it must be there.
        field: what to set instead, and as what, where that is another value.
        is_set: whether DeepSpeed is told; else only compared with what the section says.
    """

    path: str
    field: str
    value: Any
    is_set: bool = True

    def check(self, theirs: Mapping[str, Any]) -> None:
        """Raises ConfigError where the section has another value; `auto`, as other programs write it, is none."""
        found: Any = theirs
        for name in self.path.split("."):
            if not isinstance(found, Mapping) or name not in found:
                return
            found = found[name]
        found = list(found) if isinstance(found, tuple) else found
        if found != self.value and found != "auto":
            ours = "" if "=" in self.field or self.value is None else f"={self.value!r}"
            raise ConfigError(
                f"deepspeed.{self.path}={found!r} contradicts {self.field}{ours}, which decides it: remove it there"
            )


def deepspeed_settings(config: Config, world: int, precision: Precision) -> dict[str, Any]:
    """DeepSpeed's configuration: what our own fields decide, and what the `deepspeed` section adds.

    Raises:
        ConfigError: the section contradicts one of our fields, or does not suit the number of ranks.
    """
    theirs = config.deepspeed
    if _section(theirs, "fp16").get("enabled"):
        raise ConfigError(
            "deepspeed.fp16.enabled: float16 is not supported, since its loss scale overflows on purpose and leaves "
            "out steps, which nothing could tell from bad rows; set training.precision=bf16 or fp32"
        )
    decided = list(_decided(config, world, precision))
    for key in decided:
        key.check(theirs)
    _check_zero(_section(theirs, "zero_optimization"), config.training.zero_stage, world)
    settings = _copied(_DEFAULTS | theirs)
    for key in decided:
        if key.is_set:
            _put(settings, key.path, key.value)
    return settings


def _decided(config: Config, world: int, precision: Precision) -> Iterator[Decided]:
    training = config.training
    micro_rows = training.batch_rows // world // training.accumulation_steps
    yield Decided("train_batch_size", "training.batch_rows", training.batch_rows)
    yield Decided(
        "train_micro_batch_size_per_gpu", "training.batch_rows / ranks / training.accumulation_steps", micro_rows
    )
    yield Decided("gradient_accumulation_steps", "training.accumulation_steps", training.accumulation_steps)
    yield Decided("gradient_clipping", "training.max_gradient_norm", training.max_gradient_norm)
    field = f"training.precision={training.precision}"
    yield Decided("bf16.enabled", field, precision == "bf16")
    yield Decided("bfloat16.enabled", field, precision == "bf16", is_set=False)
    yield Decided("torch_autocast.enabled", field, False, is_set=False)
    yield Decided("zero_optimization.stage", "training.zero_stage", training.zero_stage)
    if training.compile:
        # DeepSpeed's own linear function looks at the state of its weights, which a compiled layer cannot.
        yield Decided("zero_optimization.memory_efficient_linear", "training.compile=True", False)
    yield Decided(
        "activation_checkpointing.cpu_checkpointing",
        "training.activation_checkpoints_on_cpu",
        training.activation_checkpoints_on_cpu,
    )
    yield from _of_the_optimizer(config)
    yield Decided("scheduler.type", f"training.schedule={training.schedule}", None, is_set=False)
    yield Decided("gradient_allreduce_op", "the loss, which is made for averages over ranks,", "mean", is_set=False)
    yield Decided("managed_gradient_accumulation", "training.accumulation_steps", True, is_set=False)
    yield Decided("checkpoint.load_universal", "--resume", False, is_set=False)
    yield Decided("tensorboard.enabled", "run_dir, whose tensorboard folder has everything,", False, is_set=False)
    yield Decided("data_efficiency.enabled", "data.*", False, is_set=False)
    for path, without in (
        ("sequence_parallel_size", 1),
        ("tensor_parallel.autotp_size", 0),
        ("expert_parallel.enabled", False),
        ("hybrid_engine.enabled", False),
    ):
        yield Decided(path, "the model, whose ranks are data parallel alone,", without, is_set=False)


def _of_the_optimizer(config: Config) -> Iterator[Decided]:
    """What an optimizer of DeepSpeed's own is built with; ours is PyTorch's AdamW, which the section does not name."""
    training, optimizer = config.training, _section(config.deepspeed, "optimizer")
    has_betas = str(optimizer.get("type", "")).lower() in _WITH_BETAS
    betas = [training.beta1, training.beta2]
    yield Decided("optimizer.params.lr", "training.learning_rate", training.learning_rate, bool(optimizer))
    yield Decided("optimizer.params.betas", "training.beta1, training.beta2", betas, has_betas)
    # The decay is a matter of the parameter groups: matrices have it, embeddings and gains do not.
    yield Decided("optimizer.params.weight_decay", "training.weight_decay", training.weight_decay, is_set=False)
    yield Decided("optimizer.params.max_grad_norm", "training.max_gradient_norm", training.max_gradient_norm, False)


def _check_zero(zero: Mapping[str, Any], stage: int, world: int) -> None:
    """What DeepSpeed would find out late, or on some ranks, or not at all."""
    where = "deepspeed.zero_optimization"
    for name in ("zero_hpz_partition_size", "mics_shard_size"):
        size = zero.get(name, 1)
        if isinstance(size, int) and size > 1 and world % size:
            raise ConfigError(f"{where}.{name}={size}: does not divide {world} ranks; give the GPUs of a node, say")
    least = {"offload_optimizer": 1, "offload_param": 3, "zero_hpz_partition_size": 3, "mics_shard_size": 3}
    least |= {"zero_quantized_weights": 3, "zero_quantized_gradients": 3}
    for name, needed in least.items():
        if stage < needed and _is_on(zero.get(name)):
            raise ConfigError(f"{where}.{name}={zero[name]!r}: needs training.zero_stage={needed}, this is {stage}")


def _is_on(value: Any) -> bool:
    if isinstance(value, Mapping):
        return value.get("device", "none") != "none"
    return value is True or (isinstance(value, int) and value > 1)


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = settings.get(name) or {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"deepspeed.{name}={section!r}: a section of keys belongs here")
    return section


def _copied(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in settings.items()}


def _put(settings: dict[str, Any], path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for name in sections:
        settings = settings.setdefault(name, {})
    settings[key] = value


class Asked(dict[str, Any]):
    """A section of settings that remembers which keys it was asked for, here and in the sections below it.

    DeepSpeed looks its keys up one by one and says nothing of others: those it never asks for would do nothing.
    """

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__({key: Asked(v) if isinstance(v, Mapping) else v for key, v in settings.items()})
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict."""
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def check(self, theirs: Mapping[str, Any], path: str = "deepspeed") -> None:
        """Raises ConfigError where a key of `theirs` was not asked for; names the nearest that was.

        A section that was taken whole is DeepSpeed's to judge: it refuses keys that it does not know.
        """
        for key, value in theirs.items():
            if key not in self.asked and path not in _JUDGED_BY_DEEPSPEED and self.asked:
                raise ConfigError(unknown_key(f"{path}.{key}", self.asked))
            below = dict.get(self, key)
            if isinstance(below, Asked) and isinstance(value, Mapping):
                below.check(value, f"{path}.{key}")


def unknown_key(path: str, known: Iterable[str]) -> str:
    """What is said of a key that DeepSpeed does not know."""
    near = difflib.get_close_matches(path.rpartition(".")[2], sorted(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known there: {', '.join(sorted(known))}"
    return f"unknown key {path}: DeepSpeed has none of this name; {hint}"


def refusal(theirs: Mapping[str, Any], error: Mapping[str, Any], known: Iterable[str]) -> str:
    """One of pydantic's errors about a section of DeepSpeed's as: dotted path, value, rule, nearest key.

    Args:
        theirs: the `deepspeed` section. error: with `loc` inside the section that it concerns. known: keys of it.
    """
    inside = [str(part) for part in error["loc"]]
    section = next((k for k, v in theirs.items() if isinstance(v, Mapping) and inside and inside[0] in v), None)
    path = ".".join(["deepspeed", *([section] if section else []), *inside])
    if error["type"] == "extra_forbidden":
        return unknown_key(path, known)
    return f"{path}={error['input']!r}: {error['msg'].removeprefix('Value error, ')}"
