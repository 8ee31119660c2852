"""What the doctor examines: a model as generation loads it, with everything it was trained with, and its shards."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.rows import RowReader
from data_pipeline.shards import SPLITS, Manifest
from data_pipeline.stream import Batch
from data_pipeline.tokenizer import MixedTokenizer
from tidal_dist.config import Config, load_config
from tidal_dist.devices import free_memory
from tidal_dist.errors import CheckpointError, ShardError, UserError
from tidal_dist.export import package
from tidal_dist.export.consolidate import check_is_no_baseline, consolidated_weights, find_checkpoint
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.provenance import Provenance, load_probe
from tidal_dist.rows import row_format
from tidal_dist.training import checkpoint as ckpt

# The weights as read, as generation uses them, in float64 and with gradients; and what passes need beside them.
_COPIES_IN_MEMORY = 1 + 1 + 2 + 2
_ROOM_FOR_PASSES = 512 << 20


@dataclass(frozen=True)
class Subject:
    """A model under examination.

    Attributes:
        path: export or checkpoint. model: as generation loads it, float32, in evaluation mode, on `device`.
        exact: the same in float64, so that a true difference stands out from rounding.
        weights: what the file holds, on the CPU. config: of the training. probe: the stored batch.
    """

    path: Path
    model: TidalTransformer
    exact: TidalTransformer
    weights: dict[str, torch.Tensor]
    tokenizer: MixedTokenizer
    provenance: Provenance
    config: Config
    probe: Batch
    manifest: Manifest
    device: str


def load_subject(path: Path, shards: Path, device: str = "cpu") -> Subject:
    """Load an export, or put a checkpoint together, beside its shards.

    Raises:
        UserError: `path` is neither, `shards` holds no documents, or the memory does not suffice.
    """
    manifest = Manifest.load(shards)
    if not any(entry["documents"] for split in SPLITS for entry in manifest.shards(split)):
        raise ShardError(f"{shards}: the shards hold no documents; run `tidal prepare` on a corpus that has some")
    if (path / package.CONFIG).is_file():
        content = package.read_config(path)
        _check_memory(path, content["parameters"] * torch.float32.itemsize, device)
        exported = package.load_export(path, torch.float32)
        files = {name: path / name for name in (package.TRAINING, package.PROBE)}
        weights = {name: w.float() for name, w in package.stored_tensors(path, content).tensors.items()}
        model, tokenizer, provenance = exported.model, exported.tokenizer, exported.provenance
    else:
        checkpoint = _checkpoint(path)
        files = {package.TRAINING: checkpoint / ckpt.CONFIG, package.PROBE: checkpoint / ckpt.PROBE}
        state = ckpt.load_state(checkpoint)
        provenance = state.provenance
        _check_memory(checkpoint, _weight_bytes(state), device)
        weights = consolidated_weights(checkpoint)
        settings = load_config(checkpoint / ckpt.CONFIG)
        check_is_no_baseline(checkpoint, settings.model)
        tokenizer = MixedTokenizer.load(checkpoint / ckpt.TOKENIZER, settings.segmentation)
        model = package.model_of_weights(settings.model, tokenizer, {k: w.clone() for k, w in weights.items()})
    return Subject(
        path=path,
        model=model.to(device),
        exact=copy.deepcopy(model).double(),
        weights=weights,
        tokenizer=tokenizer,
        provenance=provenance,
        config=load_config(files[package.TRAINING]),
        probe=load_probe(files[package.PROBE]),
        manifest=manifest,
        device=device,
    )


def _checkpoint(path: Path) -> Path:
    try:
        return find_checkpoint(path, "best")
    except CheckpointError:
        raise CheckpointError(
            f"{path}: neither an export (no {package.CONFIG}) nor a checkpoint (no {ckpt.STATE}) nor a run that "
            "holds one; give one of them"
        ) from None


def _weight_bytes(state: ckpt.TrainingState) -> int:
    return sum(math.prod(parameter["shape"]) for parameter in state.parameters.values()) * torch.float32.itemsize


def _check_memory(path: Path, weight_bytes: int, device: str) -> None:
    """Raises UserError where weights of so many bytes in float32 would not fit in the device's free memory."""
    needed, free = _COPIES_IN_MEMORY * weight_bytes + _ROOM_FOR_PASSES, free_memory(device)
    if needed > free:
        raise UserError(
            f"{path}: the examination needs about {needed / 1e9:.1f} GB on {device}, {free / 1e9:.1f} GB are free; "
            "use a device or a machine with more (--device)"
        )


def reader_of(subject: Subject, split: str) -> RowReader:
    """The training's own reader of a split's rows.

    Raises:
        ShardError: the shards have no plan for the training's rows.
    """
    config = subject.config
    return RowReader(subject.manifest, split, subject.tokenizer, row_format(config), config.data.seed)
