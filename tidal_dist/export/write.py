"""An exported folder is written under another name, proven there, and only then gets its own."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data_pipeline.files import replace_file, sha256_of, sync
from data_pipeline.segmentation import SegmentationConfig
from tidal_dist.config import ModelConfig
from tidal_dist.errors import ExportError, UserError
from tidal_dist.export.card import card
from tidal_dist.export.package import CARD, CONFIG, FORMAT, INDEX, TEXTS, checksum
from tidal_dist.export.proof import Proof, own_expectations, prove
from tidal_dist.export.tensor_files import DTYPES, Written, file_names, shares, write_tensors
from tidal_dist.export.weights import Weights
from tidal_dist.provenance import PROBE_TOLERANCE, Provenance, texts_bytes

LARGEST_FILE = 5_000_000_000


@dataclass(frozen=True)
class Product:
    """What is to be exported.

    Attributes:
        files: to copy, by their names in the folder: tokeniser, probe batch, texts, configuration of the training.
        origin: where it comes from, as JSON, for the card. is_average: no checkpoint holds these weights, so that
            what they say of the probe batch is found out here.
        dtype: what the weights are rounded to. max_file_bytes: of a file of weights, unless one weight has more.
    """

    weights: Weights
    model: ModelConfig
    segmentation: SegmentationConfig
    files: Mapping[str, Path]
    provenance: Provenance
    origin: dict[str, Any] = field(default_factory=dict)
    is_average: bool = False
    dtype: str = "fp32"
    max_file_bytes: int = LARGEST_FILE


def write_export(out: Path, product: Product) -> Proof:
    """Write an export and prove it; `out` appears whole and proven, or not at all.

    Raises:
        ExportError: `out` exists, or the export is not the model that was trained.
        UserError: the disk refuses.
    """
    if out.exists():
        raise ExportError(f"{out}: already there; remove it or choose another folder")
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # what a kill has left
        partial.mkdir(parents=True)
        _check_space(partial, product)
        content = _write(partial, product)
        proof = prove(partial)
        _describe(partial, content, proof)
        sync(partial)
        partial.rename(out)
        sync(out.parent)
    except OSError as error:
        raise UserError(
            f"{out}: cannot write ({error.strerror or error}); free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return proof


def _check_space(partial: Path, product: Product) -> None:
    needed = product.weights.numel * DTYPES[product.dtype].itemsize
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise UserError(
            f"{partial.parent}: the export needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; free space or "
            "choose another folder"
        )


def _write(partial: Path, product: Product) -> dict[str, Any]:
    """Write everything but the card; the content of `config.json`."""
    written = _write_weights(partial, product)
    for name, source in product.files.items():
        shutil.copyfile(source, partial / name)
    content: dict[str, Any] = {
        "format": FORMAT,
        "dtype": product.dtype,
        "parameters": product.weights.numel,
        "tensors": {name: list(shape) for name, shape in product.weights.shapes.items()},
        "tied": product.weights.tied,
        "model": product.model.model_dump(),
        "segmentation": product.segmentation.model_dump(),
        "provenance": vars(product.provenance),
        "origin": product.origin,
        "expected": _expected(product),
        "files": {w.name: {"bytes": w.bytes, "sha256": w.sha256} for w in written},
    }
    for name in [*product.files, *([INDEX] if len(written) > 1 else [])]:
        _record(partial, content, name)
    _write_config(partial, content)
    if product.is_average:
        loss, texts = own_expectations(partial)
        content["expected"]["probe_loss"] = loss
        if texts:
            replace_file(partial / TEXTS, texts_bytes(texts))
            _record(partial, content, TEXTS)
        _write_config(partial, content)
    return content


def _expected(product: Product) -> dict[str, float]:
    made = product.provenance
    # An average has no loss of its own yet, and what is computed twice with the same weights is the same.
    dtype = made.precision if product.is_average else product.dtype
    return {
        "probe_loss": made.probe_loss,
        "tolerance": max(PROBE_TOLERANCE[made.precision], PROBE_TOLERANCE[dtype]),
    }


def _write_weights(partial: Path, product: Product) -> list[Written]:
    dtype = DTYPES[product.dtype]

    def convert(name: str, piece: torch.Tensor) -> torch.Tensor:
        rounded = piece.to(dtype)
        if dtype == torch.float16 and (lost := rounded.isinf() & piece.isfinite()).any():
            raise ExportError(
                f"{name}: holds {float(piece[lost][0]):g}, beyond what fp16 can hold (65,504); use --dtype bf16 or fp32"
            )
        return rounded

    files = shares(product.weights, dtype.itemsize, product.max_file_bytes)
    written = [
        write_tensors(partial / file, product.weights, names, dtype, convert)
        for file, names in zip(file_names(len(files)), files, strict=True)
    ]
    if len(files) > 1:
        where = {name: w.name for w, names in zip(written, files, strict=True) for name in names}
        size = product.weights.numel * dtype.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": where}
        replace_file(partial / INDEX, json.dumps(index, indent=1).encode())
    return written


def _describe(partial: Path, content: dict[str, Any], proof: Proof) -> None:
    """Write the card, now that it is known what was proven."""
    replace_file(partial / CARD, card(content, proof).encode())
    _record(partial, content, CARD)
    _write_config(partial, content)


def _record(partial: Path, content: dict[str, Any], name: str) -> None:
    path = partial / name
    sync(path)
    content["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _write_config(partial: Path, content: dict[str, Any]) -> None:
    # The hash of what a reader of the JSON will see.
    seen = json.loads(json.dumps(content | {"checksum": ""}))
    content["checksum"] = checksum(seen)
    replace_file(partial / CONFIG, json.dumps(content, indent=1).encode())
