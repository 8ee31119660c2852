"""The experiments as they stand in their sets."""

from pathlib import Path

import pytest
import torch

from data_pipeline.tokenizer import FIRST_TOKEN, OUTPUT_VOCABULARY
from experiments.spec import Job, load_experiment
from tests.launching import ROOT
from tidal_dist.model.transformer import TidalTransformer

SPECS = sorted((ROOT / "experiments").glob("*/*.yaml"))
_CHARS = 256


def used_parameters(job: Job) -> int:
    """Without the rows of embedding and output whose ids a plain decoder never meets."""
    model, vocab_size = job.config.model, FIRST_TOKEN + job.config.tokenizer.vocab_size
    with torch.device("meta"):
        built = TidalTransformer(model, vocab_size, job.config.segmentation.max_block_bytes)
    unused = {"blocks": 0, "bytes": vocab_size - OUTPUT_VOCABULARY, "tokens": 2 * _CHARS}[model.writes]
    return sum(p.numel() for p in built.parameters()) - unused * model.width


def test_there_are_all_sets() -> None:
    assert {path.parent.name for path in SPECS} == {"small", "medium", "full"}


@pytest.mark.parametrize("path", SPECS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_variants_are_equals(path: Path) -> None:
    """Equally many parameters that are used, steps and rows, at three seeds or more."""
    experiment = load_experiment(path)
    assert len(experiment.spec.seeds) >= 3
    first, *others = {job.variant: job for job in experiment.jobs}.values()
    size = used_parameters(first)
    assert {j.name: used_parameters(j) / size for j in others if not 0.95 < used_parameters(j) / size < 1.05} == {}
    assert {(j.config.training.steps, j.config.training.batch_rows) for j in experiment.jobs} == {
        (first.config.training.steps, first.config.training.batch_rows)
    }
