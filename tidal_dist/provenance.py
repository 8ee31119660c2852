"""What weights were made from, and the probe that proves wherever they are loaded that they are still the same."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save

from data_pipeline.layout import Slots
from data_pipeline.stream import Batch


@dataclass(frozen=True)
class Provenance:
    """Where weights come from.

    Attributes:
        run: the run's folder. config_hash: sha256 of its resolved configuration.
        step: optimizer steps made. rows: rows consumed. rolling_hash: over the consumed rows' identities.
        manifest_hash, tokenizer_hash, segmentation_hash: what they were trained with.
        precision: of weights and activations in training.
        probe_loss: nats per label of the probe batch, with these weights in this precision.
        metrics: the last validation's figures.
        quarantine: shards that were left out by name, and the first row of the run that they left empty.
    """

    run: str
    config_hash: str
    step: int
    rows: int
    rolling_hash: str
    manifest_hash: str
    tokenizer_hash: str
    segmentation_hash: str
    precision: Literal["fp32", "bf16"]
    probe_loss: float
    metrics: dict[str, float]
    quarantine: dict[str, int] = field(default_factory=dict)


def probe_bytes(batch: Batch) -> bytes:
    """A probe batch as safetensors."""
    tensors = {f"{s.stream}.{n}": a for s in (batch.tokens, batch.chars) for n, a in s.arrays().items()}
    return save({n: t.contiguous() for n, t in tensors.items()} | {"labels": batch.labels.contiguous()})


def load_probe(path: Path) -> Batch:
    """A probe batch from its file."""
    arrays = load_file(path)

    def slots(stream: Any) -> Slots:
        prefix = f"{stream}."
        return Slots(stream, **{n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)})

    return Batch(slots("token"), slots("char"), arrays["labels"])


def probe_loss(model: Any, batch: Batch, device: torch.device | str) -> float:
    """Nats per label of a probe batch, in evaluation mode."""
    batch = batch.to(device)
    training = model.training
    model.eval()
    with torch.no_grad():
        loss = float(model(batch.tokens, batch.chars, batch.labels)) / max(batch.label_count(), 1)
    model.train(training)
    return loss
