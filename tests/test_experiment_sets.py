"""The experiments as they stand in their sets."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_pipeline.segmentation import SegmentationConfig
from data_pipeline.tokenizer import FIRST_TOKEN, OUTPUT_VOCABULARY
from experiments.tasks import TASKS
from tests.launching import ROOT
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.settings import ModelConfig, TrainingConfig

SPECS = sorted((ROOT / "experiments").glob("*/*.yaml"))
_CHARS = 256


def changed(spec: dict[str, Any], section: str, variant: str) -> dict[str, Any]:
    """The task's options, or a section of the configuration, of a variant."""
    base = spec["options"] if section == "options" else spec["base"].get(section, {})
    changes = spec["variants"][variant].items()
    return base | {key.partition(".")[2]: value for key, value in changes if key.startswith(f"{section}.")}


def used_parameters(model: ModelConfig, bpe_tokens: int, max_block_bytes: int) -> int:
    """Without the rows of embedding and output whose ids a plain decoder never meets."""
    vocab_size = FIRST_TOKEN + bpe_tokens
    with torch.device("meta"):
        built = TidalTransformer(model, vocab_size, max_block_bytes)
    unused = {"blocks": 0, "bytes": vocab_size - OUTPUT_VOCABULARY, "tokens": 2 * _CHARS}[model.writes]
    return sum(p.numel() for p in built.parameters()) - unused * model.width


def test_there_are_both_sets() -> None:
    assert {path.parent.name for path in SPECS} == {"small", "full"}


@pytest.mark.parametrize("path", SPECS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_variants_have_equally_many_parameters(path: Path) -> None:
    spec = yaml.safe_load(path.read_text("utf-8"))
    sizes = {}
    for variant in spec["variants"]:
        segmentation = SegmentationConfig(**changed(spec, "segmentation", variant))
        model = ModelConfig(**changed(spec, "model", variant))
        sizes[variant] = used_parameters(model, spec["base"]["tokenizer"]["vocab_size"], segmentation.max_block_bytes)
    first = next(iter(sizes.values()))
    assert {v: n / first for v, n in sizes.items() if not 0.95 < n / first < 1.05} == {}


@pytest.mark.parametrize("path", SPECS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_variants_train_on_equally_much_at_three_seeds(path: Path) -> None:
    spec = yaml.safe_load(path.read_text("utf-8"))
    assert len(spec["seeds"]) >= 3
    for variant in spec["variants"]:
        TASKS[spec["task"]].options.model_validate(changed(spec, "options", variant))  # type: ignore[attr-defined]
        training = TrainingConfig(**changed(spec, "training", variant))
        base = spec["base"]["training"]
        assert (training.steps, training.batch_rows) == (base["steps"], base["batch_rows"])
