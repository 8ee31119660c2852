"""FLOPs against what PyTorch counts in real passes."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.layout import Slots
from tidal_dist.config import ModelConfig, TrainingConfig
from tidal_dist.errors import ConfigError
from tidal_dist.flops import RowFlops, recomputed_layers, row_flops
from tidal_dist.gpus import GPUS, gpu_named, peak_tflops, recognised
from tidal_dist.model import transformer
from tidal_dist.model.transformer import TidalTransformer

SHAPES: list[dict[str, Any]] = [
    {"n_layers": 3, "width": 32, "n_heads": 2},
    {"n_layers": 4, "width": 48, "n_heads": 3, "char_layers": 2, "mlp": "gelu"},
    {"n_layers": 3, "width": 32, "n_heads": 2, "char_layers": 1, "handoff": False, "encoding": "alibi"},
    {"n_layers": 1, "width": 16, "n_heads": 1, "encoding": "none", "mlp_width": 24},
]


def slots(stream: Any, rows: int, n: int, device: str) -> Slots:
    """One document that fills the row."""
    zeros = np.zeros((rows, n), np.int64)
    arrays = dict.fromkeys(("ids", "block", "index", "start_pos", "position", "place"), zeros) | {"document": zeros + 1}
    return Slots(stream, **arrays).map(lambda a: torch.from_numpy(a).to(device))


def counted(
    config: ModelConfig,
    tokens: int,
    chars: int,
    backward: bool,
    *checkpointing: Any,
    labels: torch.Tensor | None = None,
) -> int:
    """FLOPs that PyTorch counts; on the meta device all keys are computed, as on a GPU."""
    with torch.device("meta"):
        model = TidalTransformer(config, 300, 7, *checkpointing)
    with FlopCounterMode(display=False) as counter:
        found = model(slots("token", 2, tokens, "meta"), slots("char", 2, chars, "meta"), labels)
        if backward:
            found.sum().backward()
    return counter.get_total_flops()


def scores_made_again(row: RowFlops) -> int:
    """By the backward pass of a kernel of attention: one of the two products of its forward pass."""
    return sum(flops for name, flops in row.parts().items() if "attention" in name) // 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("tokens", "chars"), [(16, 24), (40, 170), (24, 300)])
def test_the_forward_pass_is_what_pytorch_counts(shape: dict[str, Any], tokens: int, chars: int) -> None:
    config = ModelConfig(**shape)
    ours = row_flops(config, tokens, chars, max_block_bytes=7)
    assert 2 * sum(ours.parts().values()) == counted(config, tokens, chars, backward=False)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_step_is_what_pytorch_counts(shape: dict[str, Any]) -> None:
    config = ModelConfig(**shape)
    ours = row_flops(config, 40, 170, max_block_bytes=7)
    assert 2 * (ours.hardware() + scores_made_again(ours)) == counted(config, 40, 170, backward=True)


@pytest.mark.parametrize("every", [1, 2])
def test_layers_computed_again_are_what_pytorch_counts(every: int) -> None:
    config = ModelConfig(**SHAPES[1])
    training = TrainingConfig(steps=1, batch_rows=1, learning_rate=1.0, activation_checkpoint_every_layers=every)
    again = recomputed_layers(config, training)

    def checkpoint(function: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=True)

    ours = row_flops(config, 40, 170, max_block_bytes=7)
    computed = ours.hardware(again) + scores_made_again(ours)
    assert 2 * computed == counted(config, 40, 170, True, checkpoint, every)
    assert again == frozenset(range(0, 4, every))
    assert ours.hardware() < ours.hardware(again) <= ours.hardware(frozenset(range(4)))


DRAFTING: list[dict[str, Any]] = [
    {"n_layers": 3, "width": 32, "n_heads": 2, "draft_layers": 1},
    {"n_layers": 4, "width": 48, "n_heads": 3, "char_layers": 3, "draft_layers": 2, "mlp": "gelu", "encoding": "alibi"},
]


@pytest.mark.parametrize("shape", DRAFTING)
@pytest.mark.parametrize(("tokens", "chars"), [(16, 24), (40, 170)])
def test_a_step_that_also_teaches_drafts_is_what_pytorch_counts(
    shape: dict[str, Any], tokens: int, chars: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All are supervised; to see which would take memory.
    monkeypatch.setattr(transformer, "nats", lambda output, hidden, _: output(hidden).sum(dim=(1, 2, 3)))
    config = ModelConfig(**shape)
    ours = row_flops(config, tokens, chars, max_block_bytes=7)
    labels = torch.zeros(2, chars, device="meta")
    assert 2 * (ours.hardware() + scores_made_again(ours)) == counted(config, tokens, chars, True, labels=labels)
    assert ours.forward > row_flops(config.model_copy(update={"draft_layers": None}), tokens, chars, 7).forward


@given(layers=st.integers(1, 6), depth=st.integers(1, 6), tokens=st.integers(2, 300), chars=st.integers(2, 900))
def test_figures_lie_in_order(layers: int, depth: int, tokens: int, chars: int) -> None:
    config = ModelConfig(n_layers=layers, char_layers=min(depth, layers), width=16, n_heads=2)
    ours = row_flops(config, tokens, chars)
    assert 0 < ours.visible_forward <= ours.forward
    assert ours.training == 3 * ours.forward <= ours.hardware() < ours.hardware(frozenset(range(layers)))
    assert ours.forward < row_flops(config, tokens + 1, chars).forward
    assert ours.forward < row_flops(config, tokens, chars + 1).forward


def test_only_supervised_chars_have_logits() -> None:
    config = ModelConfig(**SHAPES[0])
    assert row_flops(config, 40, 170).output - row_flops(config, 40, 170, labels=50).output == 2 * 120 * 32 * 261


@pytest.mark.parametrize(
    ("device", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX 6000 Ada Generation", None),
        ("cpu", None),
    ],
)
def test_devices_are_recognised_by_their_names(device: str, gpu: str | None) -> None:
    found = recognised(device)
    assert (found and found.name) == gpu
    assert peak_tflops(device, "bf16") == (GPUS[gpu].bf16_tflops if gpu else None)


def test_what_a_gpu_cannot_do_has_no_peak() -> None:
    assert peak_tflops("Tesla V100-SXM2-32GB", "bf16") is None
    assert peak_tflops("Tesla V100-SXM2-32GB", "fp16") == 125


def test_an_unknown_gpu_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="--gpu h1000: not in the table; did you mean h100"):
        gpu_named("h1000")
    assert gpu_named(" H100 ").name == "h100"
