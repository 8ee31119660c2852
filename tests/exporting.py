"""Exports of models with random weights, without any training."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from data_pipeline.segmentation import segmentation_hash
from data_pipeline.stream import Batch
from data_pipeline.tokenizer import MixedTokenizer
from tests.builders import document_of, packed, small_model, small_tokenizer
from tidal_dist.export.package import MODEL, PROBE, TEXTS, TOKENIZER, TRAINING, stored_tensors
from tidal_dist.export.tensor_files import write_tensors
from tidal_dist.export.weights import held
from tidal_dist.export.write import Product, write_export
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.provenance import Provenance, StoredText, probe_bytes, probe_loss, texts_bytes


def write_small_export(out: Path, probe_loss_error: float = 0.0, **product: Any) -> TidalTransformer:
    """Write an export; the model it holds.

    Args:
        probe_loss_error: makes its recorded loss wrong. product: fields of `Product`.
    """
    tokenizer = small_tokenizer()
    model = small_model(tokenizer, dtype=torch.float32).eval()
    documents = [document_of("the tide 12 + 34"), document_of(" 46", prompt="12 + 34 =")]
    probe = packed([documents], tokenizer, (48, 48))
    training = "run_dir: somewhere\n"
    write_export_of(out, model, tokenizer, probe, training, probe_loss_error=probe_loss_error, product=product)
    return model


def change_weights(export: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Make the file of weights hold what `change` makes of each by its name; it stays as long as it is."""
    stored = {name: w.clone() for name, w in stored_tensors(export).tensors.items()}
    changed = held({name: change(name, w) for name, w in stored.items()})
    write_tensors(export / MODEL, changed, list(changed.shapes), torch.float32, lambda _, piece: piece)


def write_export_of(
    out: Path,
    model: TidalTransformer,
    tokenizer: MixedTokenizer,
    probe: Batch,
    training: str,
    probe_loss_error: float = 0.0,
    texts: Sequence[StoredText] = (),
    product: Mapping[str, Any] = MappingProxyType({}),
    **provenance: Any,
) -> None:
    """Write an export of a float32 model.

    Args:
        training: the configuration of the training, as YAML.
        texts: those that the checkpoint stored. product: fields of `Product` that are not to have their defaults.
        provenance: fields of `Provenance` that are not to have the values below.
    """
    fields = {
        "run": "somewhere",
        "config_hash": "2" * 64,
        "step": 1,
        "rows": 8,
        "rolling_hash": "0" * 64,
        "manifest_hash": "1" * 64,
        "tokenizer_hash": tokenizer.hash,
        "segmentation_hash": segmentation_hash(tokenizer.segmentation),
        "precision": "fp32",
        "probe_loss": probe_loss(model, probe, "cpu") + probe_loss_error,
        "metrics": {},
    }
    with tempfile.TemporaryDirectory() as name:
        files = {TOKENIZER: Path(name) / "t", PROBE: Path(name) / "p", TRAINING: Path(name) / "c"}
        tokenizer.save(files[TOKENIZER])
        files[PROBE].write_bytes(probe_bytes(probe))
        files[TRAINING].write_text(training)
        if texts:
            files[TEXTS] = Path(name) / "x"
            files[TEXTS].write_bytes(texts_bytes(texts))
        content: dict[str, Any] = {
            "weights": held(model.state_dict()),
            "model": model.config,
            "segmentation": tokenizer.segmentation,
            "files": files,
            "provenance": Provenance(**fields | provenance),  # type: ignore[arg-type]
        }
        write_export(out, Product(**content | dict(product)))
