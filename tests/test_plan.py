"""Plans: parameters and activations against real models, and what users see of `tidal plan`."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.launching import tidal_error, tidal_here
from tests.test_config import MINIMAL
from tests.test_flops import DRAFTING, SHAPES, slots
from tidal_dist.config import Config, ModelConfig, load_config, parse_config
from tidal_dist.gpus import GPUS
from tidal_dist.model import split
from tidal_dist.model.positions import chars_again
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.plan import Plan, plan
from tidal_dist.planning.activations import PassShape, biases_memory, layer_memory, logits_memory
from tidal_dist.planning.changes import changes
from tidal_dist.planning.cluster import Assumptions, Cluster
from tidal_dist.planning.content import RowContent, row_content
from tidal_dist.planning.parameters import parameters
from tidal_dist.planning.report import summary

CONFIGS = Path(__file__).parents[1] / "configs"
CONTENT = RowContent(50.0, 100.0, 90.0, 1000, "a test")


def planned(gpus: int = 8, gpu: str = "h100", nodes: int = 1, **sections: Any) -> Plan:
    return plan(config(**sections), Cluster(nodes, gpus, GPUS[gpu]), Assumptions(), CONTENT)


def config(**sections: Any) -> Config:
    content = json.loads(json.dumps(MINIMAL))
    content["data"] |= {"lanes": 64}
    content["training"] |= {"batch_rows": 64}
    for name, values in sections.items():
        content[name] = content.get(name, {}) | values
    return parse_config(content, "test")


@pytest.mark.parametrize("shape", [*SHAPES, *DRAFTING, {**SHAPES[0], "places": False}, {**SHAPES[1], "place_shift": 9}])
def test_parameters_are_those_of_the_model(shape: dict[str, Any]) -> None:
    model_config = ModelConfig(**shape)
    with torch.device("meta"):
        model = TidalTransformer(model_config, 321, 20)
    counted = parameters(model_config, 321, 20)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.layer == sum(p.numel() for p in model.layers[0].parameters())
    assert counted.gains == sum(p.numel() for p in model.parameters() if p.dim() == 1)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_parameters_of_the_shipped_models(path: Path) -> None:
    shipped = load_config(path)
    vocab_size, block = shipped.tokenizer.vocab_size + 261, shipped.segmentation.max_block_bytes
    with torch.device("meta"):
        model = TidalTransformer(shipped.model, vocab_size, block)
    assert parameters(shipped.model, vocab_size, block).total == sum(p.numel() for p in model.parameters())


def kept_by_autograd(action: Callable[[], Any], besides: list[torch.Tensor]) -> int:
    """Bytes of the storages that autograd keeps of what `action` computes, and of what it returns."""
    storages: dict[int, int] = {}
    known = {t.untyped_storage().data_ptr() for t in besides}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    kept_alive = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept_alive.append(action())
    return sum(size for pointer, size in storages.items() if pointer not in known)


@pytest.mark.parametrize("shape", [*SHAPES, *DRAFTING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_keep_what_the_plan_says(
    shape: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU: all attend to all tokens of the row.
    monkeypatch.setattr(split, "asks_rows", lambda _: False)
    model_config = ModelConfig(**shape)
    model = TidalTransformer(model_config, 300, 7).to(dtype)
    tokens, chars = slots("token", 3, 120, "cpu"), slots("char", 3, 200, "cpu")
    pass_shape = PassShape(model_config, 3, 120, 200, 8, 200, dtype.itemsize, fused_norms=False)
    prepared, angles = model.prepare(tokens, chars, dtype, None)
    if model_config.draft_layers and angles:
        angles = chars_again(angles, 120)
    parts = [*prepared.token_parts, *prepared.char_parts]
    held = [*model.parameters(), *(part.bias for part in parts), *(angles or ())]
    for i, layer in enumerate(model.layers):
        has_chars = i >= model_config.n_layers - model_config.char_depth
        drafted = 200 if model_config.draft_entry is not None and i >= model_config.draft_entry else 0
        n = 320 + drafted if has_chars else 120
        x = torch.randn(3, n, model_config.width, dtype=dtype, requires_grad=True)
        predicted = layer_memory(pass_shape, i)
        measured = kept_by_autograd(lambda x=x, layer=layer, d=drafted: layer(x, 120, prepared, angles, None, d), held)
        assert predicted.kept == pytest.approx(measured, rel=0.03), i
    assert biases_memory(pass_shape) == sum(t.untyped_storage().nbytes() for t in held[len(list(model.parameters())) :])


def test_the_loss_keeps_logarithms_in_float32() -> None:
    model = TidalTransformer(ModelConfig(**SHAPES[0]), 300, 7).to(torch.bfloat16)
    tokens, chars = slots("token", 2, 16, "cpu"), slots("char", 2, 48, "cpu")
    labels = torch.zeros(2, 48, dtype=torch.long)
    whole = kept_by_autograd(lambda: model(tokens, chars, labels), list(model.parameters()))
    states = kept_by_autograd(lambda: model(tokens, chars).sum(), list(model.parameters()))
    shape = PassShape(model.config, 2, 16, 48, 8, 48, 2, fused_norms=True)
    assert whole - states == pytest.approx(96 * 261 * 4, rel=0.02)
    # Beside them the logits themselves, in bf16 and float32, and the gradient of the logarithms.
    assert logits_memory(shape) == 96 * 261 * (2 + 3 * 4) + 3 * 96 * 32 * 2


def test_zero_divides_the_states() -> None:
    model = {"n_layers": 8, "width": 1024, "n_heads": 8}
    by_stage = [planned(model=model, training={"batch_rows": 64, "zero_stage": stage}).states for stage in range(4)]
    total = planned(model=model).parameters.total
    assert [s.weights for s in by_stage[:3]] == [2 * total] * 3
    assert by_stage[3].weights == pytest.approx(2 * total / 8, rel=0.01)
    assert [s.gradients for s in by_stage[:2]] == [2 * total] * 2
    assert by_stage[2].gradients == pytest.approx(2 * total / 8, rel=1e-6)
    assert by_stage[0].optimizer == 12 * total
    assert by_stage[1].optimizer == pytest.approx(12 * total / 8, rel=1e-6)


def test_offloaded_states_lie_on_the_host() -> None:
    zero = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "nvme", "nvme_path": "x"}}
    made, plain = planned(deepspeed={"zero_optimization": zero}), planned()
    assert (made.states.optimizer, made.states.gradients) == (0, 0)
    assert made.states.host > plain.states.optimizer
    assert made.memory_bytes < plain.memory_bytes


def test_hpz_keeps_the_backward_gather_inside_the_node() -> None:
    plain = planned(nodes=8, gpus=8)
    hpz = planned(nodes=8, gpus=8, deepspeed={"zero_optimization": {"zero_hpz_partition_size": 8}})
    names = [c.name for c in plain.collectives]
    assert names == ["gather weights, forward", "gather weights, backward", "reduce gradients"]
    size = 2 * plain.parameters.total
    assert plain.collectives[1].network_bytes == pytest.approx(size * 7 / 8 / 8)
    assert plain.collectives[1].link_bytes == pytest.approx(size * 63 / 64)
    assert hpz.collectives[1].network_bytes == 0
    assert hpz.collectives[1].link_bytes == pytest.approx(size * 7 / 8)
    assert hpz.states.secondary == pytest.approx(size / 8, rel=1e-3)


def test_quantisation_halves_and_quarters() -> None:
    zero = {"zero_quantized_weights": True, "zero_quantized_gradients": True}
    plain, quantised = planned(nodes=8), planned(nodes=8, deepspeed={"zero_optimization": zero})
    weights, _, gradients = zip(plain.collectives, quantised.collectives, strict=True)
    assert weights[1].network_bytes == pytest.approx(weights[0].network_bytes / 2)
    assert gradients[1].network_bytes == pytest.approx(gradients[0].network_bytes / 4)


@settings(max_examples=40)
@given(
    nodes=st.sampled_from([1, 2, 8, 128, 512]),
    passes=st.sampled_from([1, 2, 4]),
    every=st.integers(1, 4),
    depth=st.integers(1, 4),
    stage=st.integers(0, 3),
)
def test_plans_of_any_size_are_consistent(nodes: int, passes: int, every: int, depth: int, stage: int) -> None:
    training = {"batch_rows": 16384, "zero_stage": stage, "accumulation_steps": passes}
    checkpointed = training | {"activation_checkpoint_every_layers": every}
    sections: dict[str, Any] = {"data": {"lanes": 4096}, "model": {"char_layers": depth}}
    made = planned(nodes=nodes, training=checkpointed, **sections)
    kept = planned(nodes=nodes, training=training | {"activation_checkpointing": False}, **sections)
    on_host = planned(nodes=nodes, training=checkpointed | {"activation_checkpoints_on_cpu": True}, **sections)
    assert 0 < made.utilisation < made.assumed.matmul_share
    assert made.activations.total <= kept.activations.total
    assert on_host.activations.total <= made.activations.total
    assert made.hardware_flops > kept.hardware_flops
    assert made.memory_bytes == sum(made.memory().values())
    assert made.step_seconds >= made.compute_seconds
    assert made.rows.micro * made.rows.passes * made.cluster.ranks == 16384


def test_what_does_not_fit_names_what_would() -> None:
    big = {"n_layers": 32, "width": 4096, "n_heads": 32, "char_layers": 2}
    data = {"row_tokens": 2048, "row_chars": 8192}
    settings_ = config(model=big, data=data, training={"activation_checkpointing": False})
    made = plan(settings_, Cluster(1, 8, GPUS["h100"]), Assumptions(), CONTENT)
    assert not made.fits
    found = changes(settings_, made)
    assert any("activation_checkpointing=true" in c.text for c in found)
    assert any("accumulation_steps" in c.text for c in found)
    assert any("nodes" in c.text for c in found)
    assert [c.fits for c in found] == sorted((c.fits for c in found), reverse=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config().model_dump()))
    return tmp_path / "config.yaml"


def test_the_command(path: Path) -> None:
    cluster = ["--nodes", "2", "--gpus-per-node", "8", "--gpu", "h100"]
    text = tidal_here("plan", path, *cluster, "--gpu-hour-price", "2.5").stdout.decode()
    for word in ("parameters", "memory of a GPU", "optimizer", "utilisation (MFU)", "it fits", "assumed:", "960 at"):
        assert word in text
    report = json.loads(tidal_here("plan", path, *cluster, "--json").stdout)
    assert report["cluster"]["gpus"] == 16
    assert report["each_day"]["cost"] is None
    assert report["memory"]["total"] < report["memory"]["gpu"]
    assert "assumed" in report["content_of_a_row"]["source"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--nodes", "1", "--gpus-per-node", "8", "--gpu", "h1000"], "did you mean h100?"),
        (["--nodes", "0", "--gpus-per-node", "8", "--gpu", "h100"], "--nodes 0: must be at least 1"),
        (["--nodes", "1", "--gpus-per-node", "0", "--gpu", "h100"], "--gpus-per-node 0"),
        (
            ["--nodes", "1", "--gpus-per-node", "7", "--gpu", "h100"],
            "data.lanes=64: each reads equally many lanes; 4 or 8",
        ),
        (["--nodes", "1", "--gpus-per-node", "8", "--gpu", "v100"], "v100 has no bf16; set training.precision=fp32"),
        (
            ["--nodes", "1", "--gpus-per-node", "8", "--gpu", "h100", "training.accumulation_steps=3"],
            "does not divide the 8 rows of a GPU",
        ),
        (
            ["--nodes", "1", "--gpus-per-node", "8", "--gpu", "h100", "deepspeed={train_batch_size: 3}"],
            "deepspeed.train_batch_size=3 contradicts training.batch_rows=64",
        ),
        (["--nodes", "1", "--gpus-per-node", "8", "--gpu", "h100", "--matmul-share", "2"], "--matmul-share 2"),
    ],
)
def test_mistakes_end_in_one_line(path: Path, arguments: list[str], expected: str) -> None:
    assert expected in tidal_error("plan", path, *arguments)


SIZED = ["125m", "1b", "7b", "30b"]


def assumed_content(sized: Config) -> RowContent:
    """Without looking for shards, which somebody may have prepared."""
    elsewhere = sized.data.model_copy(update={"shards": "no/such/folder"})
    return row_content(sized.model_copy(update={"data": elsewhere}))


@pytest.mark.parametrize("name", SIZED)
def test_the_configs_say_what_the_plan_says(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text("utf-8")
    found = re.search(r"`tidal plan configs/(\w+)\.yaml --nodes (\d+) --gpus-per-node (\d+) --gpu (\w+)` says", text)
    assert found, "the header names the cluster"
    sized = load_config(CONFIGS / f"{name}.yaml")
    cluster = Cluster(int(found[2]), int(found[3]), GPUS[found[4]])
    made = plan(sized, cluster, Assumptions(), assumed_content(sized))
    assert found[1] == name
    assert f"#   {summary(made)}" in text.splitlines()
    assert made.fits
    assert made.memory_bytes < 0.75 * cluster.gpu.memory_gb * 1e9  # nothing of it was measured on a GPU


@pytest.mark.parametrize(("name", "size"), list(zip(SIZED, [125e6, 1e9, 7e9, 30e9], strict=True)))
def test_the_configs_have_the_size_of_their_name(name: str, size: float) -> None:
    sized = load_config(CONFIGS / f"{name}.yaml")
    assert parameters(sized.model, sized.tokenizer.vocab_size + 261, 32).total == pytest.approx(size, rel=0.05)
