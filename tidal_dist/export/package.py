"""The exported folder: write, verify, load. Needs neither DeepSpeed nor shards.

model.safetensors   weights in float32
tokenizer.json      the BPE
probe.safetensors   a batch whose loss the checkpoint stored
training.yaml       the configuration of the training
config.json         model, segmentation, provenance, and size and sha256 of the other files; written last
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data_pipeline.files import read_description, replace_file, sha256_of
from data_pipeline.segmentation import SegmentationConfig, segmentation_hash
from data_pipeline.tokenizer import MixedTokenizer
from tidal_dist.config import ModelConfig
from tidal_dist.errors import ExportError, UserError
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.provenance import PROBE_TOLERANCE, Provenance, load_probe, probe_loss

FORMAT = 1
MODEL, TOKENIZER, PROBE, TRAINING = "model.safetensors", "tokenizer.json", "probe.safetensors", "training.yaml"
CONFIG = "config.json"
TORCH_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Exported:
    """A loaded export: the model, on the CPU and in evaluation mode, and its tokeniser."""

    model: TidalTransformer
    tokenizer: MixedTokenizer
    provenance: Provenance


def write_export(
    out: Path,
    weights: dict[str, torch.Tensor],
    model: ModelConfig,
    segmentation: SegmentationConfig,
    files: dict[str, Path],
    provenance: Provenance,
) -> float:
    """Write an export and prove that it repeats the checkpoint's probe loss, which it returns. `out` appears whole.

    Args:
        files: the files to copy, by their names here: tokeniser, probe batch, configuration of the training.

    Raises:
        ExportError: `out` exists, or the loss differs.
    """
    if out.exists():
        raise ExportError(f"{out}: already there; remove it or choose another folder")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file(weights, partial / MODEL)
        for name, source in files.items():
            shutil.copyfile(source, partial / name)
        names = (MODEL, *files)
        content = {
            "format": FORMAT,
            "model": model.model_dump(),
            "segmentation": segmentation.model_dump(),
            "provenance": vars(provenance),
            "files": {n: {"bytes": (partial / n).stat().st_size, "sha256": sha256_of(partial / n)} for n in names},
        }
        replace_file(partial / CONFIG, json.dumps(content, indent=1).encode())
        loss = verify_export(partial)
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot write ({error}); free space or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return loss


def load_export(folder: str | Path) -> Exported:
    """Load an export, strictly.

    Raises:
        ExportError: a file is missing, torn or of another format, or weights are missing or unexpected.
    """
    folder = Path(folder)
    content = _read_config(folder)
    for name, expected in content["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != expected["bytes"]:
            state = "missing" if found is None else f"{found} bytes instead of {expected['bytes']}: torn"
            raise ExportError(f"{folder / name}: {state}; export the checkpoint anew")
    try:
        segmentation = SegmentationConfig.model_validate(content["segmentation"])
        config = ModelConfig.model_validate(content["model"])
        provenance = Provenance(**content["provenance"])
        if provenance.precision not in TORCH_DTYPE:
            raise ValueError(f"precision {provenance.precision}")
    except (ValueError, TypeError) as error:
        raise ExportError(f"{folder / CONFIG}: not a configuration this program knows ({error})") from None
    tokenizer = MixedTokenizer.load(folder / TOKENIZER, segmentation)
    for what, found_hash, expected_hash in (
        ("tokeniser", tokenizer.hash, provenance.tokenizer_hash),
        ("segmentation", segmentation_hash(segmentation), provenance.segmentation_hash),
    ):
        if found_hash != expected_hash:
            raise ExportError(f"{folder}: its {what} is not the one of the training; export the checkpoint anew")
    try:
        model = model_of_weights(config, tokenizer, load_file(folder / MODEL))
    except (SafetensorError, RuntimeError) as error:
        raise ExportError(f"{folder / MODEL}: {' '.join(str(error).split())}; export the checkpoint anew") from None
    return Exported(model, tokenizer, provenance)


def model_of_weights(
    config: ModelConfig, tokenizer: MixedTokenizer, weights: dict[str, torch.Tensor]
) -> TidalTransformer:
    """A model on the CPU, in evaluation mode, that holds `weights` without copying them.

    Raises:
        RuntimeError: weights are missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        model = TidalTransformer(config, tokenizer.vocab_size, tokenizer.segmentation.max_block_bytes)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def verify_export(folder: Path) -> float:
    """Check an export's files by their hashes and repeat its probe batch in the training's precision; the loss.

    Raises:
        ExportError: a file is not the one that was written, or the loss differs from the checkpoint's.
    """
    for name, recorded in _read_config(folder)["files"].items():
        if (folder / name).is_file() and sha256_of(folder / name) != recorded["sha256"]:
            raise ExportError(f"{folder / name}: its content is not what was written; export the checkpoint anew")
    exported = load_export(folder)
    precision, expected = exported.provenance.precision, exported.provenance.probe_loss
    loss = probe_loss(exported.model.to(TORCH_DTYPE[precision]), load_probe(folder / PROBE), "cpu")
    if not abs(loss - expected) <= PROBE_TOLERANCE[precision] * max(1.0, abs(expected)):
        raise ExportError(f"{folder}: the probe batch's loss is {loss:.6f}, the checkpoint's was {expected:.6f}")
    return loss


def _read_config(folder: Path) -> dict[str, Any]:
    content, _ = read_description(
        folder / CONFIG,
        FORMAT,
        {"model", "segmentation", "provenance", "files"},
        ExportError,
        f"{folder}: no {CONFIG}, so no exported model; make one with `tidal export`",
        "export the checkpoint anew",
    )
    return content
