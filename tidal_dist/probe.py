"""The probe: a small batch whose loss is stored with the weights and repeated wherever they are loaded."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from data_pipeline.layout import Slots
from data_pipeline.stream import Batch


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
