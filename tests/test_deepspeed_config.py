"""What the `deepspeed` section may say, against DeepSpeed itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from tests.test_config import MINIMAL
from tests.test_flops import slots
from tidal_dist.config import Config, ModelConfig, load_config, parse_config
from tidal_dist.errors import ConfigError
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.planning.states import ZERO_DEFAULTS
from tidal_dist.training.engine import deepspeed_config
from tidal_dist.training.passthrough import deepspeed_settings

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes DeepSpeed believe that there are so many ranks, this one the first."""

    def believe(world: int) -> None:
        monkeypatch.setattr(deepspeed.comm, "get_world_size", lambda: world)
        monkeypatch.setattr(deepspeed.comm, "get_rank", lambda: 0)

    return believe


def config(section: dict[str, Any], **training: Any) -> Config:
    content = MINIMAL | {"deepspeed": section, "training": MINIMAL["training"] | {"precision": "fp32"} | training}
    return parse_config(content, "test")


@pytest.mark.parametrize(
    "section",
    [
        {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}},
        {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "x"}}, "aio": {"block_size": 1048576}},
        {"zero_optimization": {"zero_hpz_partition_size": 2, "zero_quantized_weights": True}},
        {"zero_optimization": {"zero_quantized_gradients": True, "overlap_comm": False, "reduce_bucket_size": 5e7}},
        {"communication_data_type": "fp32", "prescale_gradients": True},
        {"wall_clock_breakdown": True, "flops_profiler": {"enabled": True, "profile_step": 5}},
        {"optimizer": {"type": "AdamW", "params": {"eps": 1e-6}}},
        {"optimizer": {"type": "Lion"}},
        {"activation_checkpointing": {"profile": True}},
        {"csv_monitor": {"enabled": True, "output_path": "x"}, "comms_logger": {"enabled": True}},
        {"data_types": {"grad_accum_dtype": "fp32"}, "checkpoint": {"parallel_write": {"pipeline_stage": True}}},
        {"steps_per_print": 10, "zero_force_ds_cpu_optimizer": True, "disable_python_gc": True},
        {"bf16": {"enabled": False, "check_grad_overflow": True}, "train_batch_size": "auto", "timers": {}},
        {"train_batch_size": 8, "gradient_clipping": 1.0, "zero_optimization": {"stage": 3}},
    ],
)
def test_everything_else_is_passed_on(section: dict[str, Any], ranks: Callable[[int], None]) -> None:
    ranks(2)
    passed = deepspeed_config(config(section), 2)

    def holds(theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
        return all(
            holds(value, ours[key]) if isinstance(value, dict) else value in (ours[key], "auto")
            for key, value in theirs.items()
        )

    assert holds(section, passed)
    assert passed["train_micro_batch_size_per_gpu"] == 4
    assert passed["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("section", "ours"),
    [
        ({"train_batch_size": 16}, "deepspeed.train_batch_size=16 contradicts training.batch_rows=8"),
        ({"train_micro_batch_size_per_gpu": 8}, "training.batch_rows / ranks / training.accumulation_steps=4"),
        ({"gradient_accumulation_steps": 2}, "training.accumulation_steps=1"),
        ({"gradient_clipping": 5.0}, "deepspeed.gradient_clipping=5.0 contradicts training.max_gradient_norm=1.0"),
        ({"bf16": {"enabled": True}}, "deepspeed.bf16.enabled=True contradicts training.precision=fp32"),
        ({"bfloat16": {"enabled": True}}, "training.precision=fp32"),
        ({"fp16": {"enabled": True}}, "deepspeed.fp16.enabled: float16 is not supported"),
        ({"torch_autocast": {"enabled": True}}, "training.precision"),
        ({"zero_optimization": {"stage": 2}}, "deepspeed.zero_optimization.stage=2 contradicts training.zero_stage=3"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}, "training.learning_rate=0.001"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.8, 0.9]}}}, "training.beta1, training.beta2"),
        ({"optimizer": {"params": {"weight_decay": 0.3}}}, "training.weight_decay=0.1"),
        ({"optimizer": {"params": {"max_grad_norm": 3.0}}}, "training.max_gradient_norm=1.0"),
        ({"scheduler": {"type": "WarmupLR"}}, "training.schedule=cosine"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "training.activation_checkpoints_on_cpu=False"),
        ({"gradient_allreduce_op": "sum"}, "averages over ranks"),
        ({"checkpoint": {"load_universal": True}}, "--resume"),
        ({"tensorboard": {"enabled": True}}, "run_dir"),
        ({"data_efficiency": {"enabled": True}}, "data.*"),
        ({"sequence_parallel_size": 2}, "data parallel alone"),
        ({"managed_gradient_accumulation": False}, "training.accumulation_steps"),
    ],
)
def test_what_our_fields_decide_is_not_contradicted(section: dict[str, Any], ours: str) -> None:
    with pytest.raises(ConfigError) as caught:
        deepspeed_settings(config(section), 2, "fp32")
    assert ours in str(caught.value)
    assert str(caught.value).startswith("deepspeed.")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("section", "stage", "world", "expected"),
    [
        ({"zero_hpz_partition_size": 3}, 3, 4, "zero_hpz_partition_size=3: does not divide 4 ranks"),
        ({"mics_shard_size": 8}, 3, 4, "mics_shard_size=8: does not divide 4 ranks"),
        ({"zero_hpz_partition_size": 2}, 2, 4, "needs training.zero_stage=3, this is 2"),
        ({"offload_param": {"device": "cpu"}}, 2, 4, "offload_param={'device': 'cpu'}: needs training.zero_stage=3"),
        ({"offload_optimizer": {"device": "cpu"}}, 0, 4, "needs training.zero_stage=1, this is 0"),
        ({"zero_quantized_weights": True}, 1, 4, "needs training.zero_stage=3"),
    ],
)
def test_what_does_not_suit_the_ranks_or_the_stage(
    section: dict[str, Any], stage: int, world: int, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        deepspeed_settings(config({"zero_optimization": section}, zero_stage=stage), world, "fp32")
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (
            {"wall_clock_breakdwn": True},
            "unknown key deepspeed.wall_clock_breakdwn",
        ),
        ({"wall_clock_breakdwn": True}, "did you mean wall_clock_breakdown?"),
        ({"zero_optimisation": {}}, "did you mean zero_optimization?"),
        ({"flops_profiler": {"enabled": True, "profle_step": 2}}, "deepspeed.flops_profiler.profle_step"),
        ({"zero_optimization": {"overlap_com": True}}, "deepspeed.zero_optimization.overlap_com: "),
        ({"zero_optimization": {"overlap_com": True}}, "did you mean overlap_comm?"),
        ({"zero_optimization": {"stage3_prefetch_bucket": 1}}, "did you mean stage3_prefetch_bucket_size?"),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, "offload_optimizer.devise"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "deepspeed.zero_optimization.reduce_bucket_size=-1: "),
        ({"zero_optimization": {"mics_shard_size": 2}}, "refused by DeepSpeed"),
        ({"communication_data_type": "fp8"}, "Invalid communication_data_type"),
        ({"zero_optimization": True}, "a section of keys belongs here"),
        ({"amp": {"enabled": True}}, "refused by DeepSpeed"),
    ],
)
def test_what_deepspeed_does_not_know(section: dict[str, Any], expected: str, ranks: Callable[[int], None]) -> None:
    ranks(2)
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(config(section), 2)
    assert expected in str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_the_shipped_sections_are_understood(path: Path, ranks: Callable[[int], None]) -> None:
    shipped = load_config(path, ["training.precision=fp32"])
    hpz = shipped.deepspeed.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    ranks(hpz)
    assert deepspeed_config(shipped, hpz)["zero_optimization"]["stage"] == shipped.training.zero_stage


def test_a_plan_has_deepspeeds_own_defaults() -> None:
    theirs = {info.alias or name: info.default for name, info in DeepSpeedZeroConfig.model_fields.items()}
    assert {key: theirs[key] for key in ZERO_DEFAULTS} == ZERO_DEFAULTS


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("every", [1, 2])
def test_inputs_on_the_host_change_no_digit(
    monkeypatch: pytest.MonkeyPatch, ranks: Callable[[int], None], dropout: float, every: int
) -> None:
    """As on a GPU: DeepSpeed empties a layer's input after its forward pass, and brings a copy for the backward."""
    ranks(1)

    def gradients(*checkpointing: Any) -> list[torch.Tensor]:
        torch.manual_seed(1)
        shape = ModelConfig(n_layers=4, width=32, n_heads=2, char_layers=2, dropout=dropout)
        model = TidalTransformer(shape, 300, 7, *checkpointing)
        labels = torch.arange(48).expand(2, 48)
        torch.manual_seed(2)
        loss = model(slots("token", 2, 16, "cpu"), slots("char", 2, 48, "cpu"), labels)
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    kept = gradients()
    copies = []

    def copy(item: tuple, device: torch.device, criterion_func: Any) -> tuple:
        copies.append(device)
        return tuple(x.clone() if criterion_func(x) else x for x in item)

    monkeypatch.setattr(checkpointing, "copy_to_device", copy)
    checkpointing.configure(None, checkpoint_in_cpu=True)
    try:
        again = gradients(checkpointing.checkpoint, every)
    finally:
        checkpointing.configure(None, checkpoint_in_cpu=False)
    assert torch.device("cpu") in copies
    assert len(again) == len(kept)
    assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))
