"""What weights were made from, and what proves wherever they are loaded that they are still the same: a probe batch
with its loss, and prompts with the texts that were written after them."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save

from data_pipeline.errors import UserError
from data_pipeline.layout import Slots
from data_pipeline.preparing.corpus_hashes import CORPUS
from data_pipeline.shards import Manifest
from data_pipeline.stream import Batch

# Sums in another order (other kernels, threads, ranks) move a float32 loss by about 1e-6, a bf16 one by about 1e-3.
# Weights that are rounded to fp16, whose steps are 8 times finer than bf16's, lie in between.
PROBE_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 1e-2}
_TEXTS_FORMAT = 1
_FEW_FILES = 8  # of a corpus: each is named with its hash
_LONGEST_TEXT = 64  # bytes that are stored: to write them again takes a pass of the model for each


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
        quarantine: what was left out: of each shard, by name, the first row of the run that it left empty; and under
            "rows N" the row after a stretch of rows from N on.
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


def corpus_of(manifest: Manifest) -> dict[str, Any]:
    """How the corpus files that shards were made of can be told, as JSON; nothing where nobody has recorded it.

    Their number, how many of them were hashed, the sha256 of the list of these, and its lines where they are few.
    """
    if CORPUS not in manifest.content["files"]:
        return {}
    lines = manifest.storage.read(CORPUS).decode(errors="replace").splitlines()
    return {
        "files": manifest.content["read"]["files"],
        "hashed": len(lines),
        "list_sha256": manifest.content["files"][CORPUS]["sha256"],
        "lines": lines if len(lines) <= _FEW_FILES else [],
    }


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


@dataclass(frozen=True)
class StoredText:
    """A greedy text: `blocks` after the blocks of `prompt`, within `max_bytes` and `max_blocks`; `finish` says why it
    ends there."""

    prompt: list[str]
    blocks: list[str]
    finish: str
    max_bytes: int
    max_blocks: int | None

    def shortened(self) -> "StoredText":
        """The text as a limit of 64 bytes would have made it."""
        size, kept = 0, []
        for block in self.blocks:
            size += len(block.encode())
            if size > _LONGEST_TEXT:
                break
            kept.append(block)
        finish = self.finish if len(kept) == len(self.blocks) else "length"
        return StoredText(self.prompt, kept, finish, min(self.max_bytes, _LONGEST_TEXT), self.max_blocks)


def texts_bytes(texts: Iterable[StoredText]) -> bytes:
    """The content of `texts.json`."""
    return json.dumps({"format": _TEXTS_FORMAT, "texts": [asdict(text) for text in texts]}, indent=1).encode()


def read_texts(path: Path, error: type[UserError]) -> list[StoredText]:
    """The texts of a file.

    Raises:
        error: it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != _TEXTS_FORMAT:
            raise ValueError(f"format {content['format']}, this program reads {_TEXTS_FORMAT}")
        return [StoredText(**text) for text in content["texts"]]
    except (OSError, ValueError, KeyError, TypeError) as reason:
        raise error(f"{path}: cannot read ({reason}); export the checkpoint anew") from None
