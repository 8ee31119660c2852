"""The exported folder: what is in it, and loading it. Needs neither DeepSpeed nor shards, and runs no pickle.

model.safetensors   the weights, or model-00001-of-0000N.safetensors ... with model.safetensors.index.json
tokenizer.json      the BPE
probe.safetensors   a batch whose loss the checkpoint stored
texts.json          prompts and the greedy texts after them, where the checkpoint stored some
training.yaml       the configuration of the training
README.md           the card: what the weights are, what they were trained on, what was proven
config.json         model, segmentation, provenance, what to expect, size and sha256 of the other files; written last
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.files import read_description
from data_pipeline.segmentation import SegmentationConfig, segmentation_hash
from data_pipeline.tokenizer import MixedTokenizer
from tidal_dist.config import ModelConfig
from tidal_dist.errors import ExportError
from tidal_dist.export.tensor_files import DTYPES, Tensors, map_tensors
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.provenance import PROBE_TOLERANCE, Provenance

FORMAT = 2
MODEL, TOKENIZER, PROBE, TRAINING = "model.safetensors", "tokenizer.json", "probe.safetensors", "training.yaml"
TEXTS, CARD, INDEX, CONFIG = "texts.json", "README.md", "model.safetensors.index.json", "config.json"
REMEDY = "export the checkpoint anew"


@dataclass(frozen=True)
class Exported:
    """A loaded export: the model, on the CPU and in evaluation mode, and its tokeniser.

    Attributes:
        tensors: the files' tensors, which the model holds unless another type was asked for.
    """

    model: TidalTransformer
    tokenizer: MixedTokenizer
    provenance: Provenance
    tensors: Tensors


def load_export(folder: str | Path, dtype: torch.dtype | None = None) -> Exported:
    """Load an export, strictly: the weights are mapped, so that what is not touched takes no memory.

    Args:
        dtype: of the weights; none: as they are stored. Another one is a copy in memory.

    Raises:
        ExportError: a file is missing, torn or of another format, or weights are missing or unexpected.
    """
    folder = Path(folder)
    content = read_config(folder)
    # People may write on the card: that is for `tidal verify` to tell.
    check_sizes(folder, {name: file for name, file in content["files"].items() if name != CARD})
    try:
        segmentation = SegmentationConfig.model_validate(content["segmentation"])
        config = ModelConfig.model_validate(content["model"])
        provenance = Provenance(**content["provenance"])
        if provenance.precision not in DTYPES:
            raise ValueError(f"precision {provenance.precision}")
    except (ValueError, TypeError) as error:
        raise ExportError(f"{folder / CONFIG}: not a configuration this program knows ({error})") from None
    tokenizer = MixedTokenizer.load(folder / TOKENIZER, segmentation)
    for what, found_hash, expected_hash in (
        ("tokeniser", tokenizer.hash, provenance.tokenizer_hash),
        ("segmentation", segmentation_hash(segmentation), provenance.segmentation_hash),
    ):
        if found_hash != expected_hash:
            raise ExportError(f"{folder}: its {what} is not the one of the training; {REMEDY}")
    tensors = stored_tensors(folder, content)
    weights = tensors.tensors if dtype is None else {name: w.to(dtype) for name, w in tensors.tensors.items()}
    try:
        model = model_of_weights(config, tokenizer, weights)
    except RuntimeError as error:
        raise ExportError(f"{folder / MODEL}: {' '.join(str(error).split())}; {REMEDY}") from None
    return Exported(model, tokenizer, provenance, tensors)


def stored_tensors(folder: Path, content: dict[str, Any] | None = None) -> Tensors:
    """The weights as the files have them, tied ones under each of their names.

    Raises:
        ExportError: a file is missing or torn.
    """
    content = content or read_config(folder)
    stored = map_tensors(folder / name for name in weight_files(content))
    for alias, name in content["tied"].items():
        if name not in stored.tensors:
            raise ExportError(f"{folder / CONFIG}: {alias} is to be {name}, which is not there; {REMEDY}")
        stored.tensors[alias] = stored.tensors[name]
    return stored


def weight_files(content: dict[str, Any]) -> list[str]:
    """The names of the files that hold the weights, from the content of `config.json`."""
    return [name for name in content["files"] if name.startswith("model") and name.endswith(".safetensors")]


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


def check_sizes(folder: Path, files: dict[str, Any]) -> None:
    """Check that files are there in full. files: as in `config.json`.

    Raises:
        ExportError: one is not.
    """
    for name, expected in files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != expected["bytes"]:
            state = "missing" if found is None else f"{found} bytes instead of {expected['bytes']}: torn"
            raise ExportError(f"{folder / name}: {state}; {REMEDY}")


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json`; of format 1, what it says in the words of this one.

    Raises:
        ExportError: there is none, or it is of another format.
    """
    required = {"model", "segmentation", "provenance", "files"}
    absent = f"{folder}: no {CONFIG}, so no exported model; make one with `tidal export`"
    found = _format_of(folder / CONFIG)
    if isinstance(found, int) and found > FORMAT:
        raise ExportError(
            f"{folder / CONFIG}: format {found}, this program reads up to {FORMAT}; install a newer tidal-dist"
        )
    is_first = found == 1
    required |= set() if is_first else {"dtype", "tensors", "tied", "origin", "expected", "checksum"}
    content, _ = read_description(folder / CONFIG, 1 if is_first else FORMAT, required, ExportError, absent, REMEDY)
    if is_first:
        made = content["provenance"]
        expected = {"probe_loss": made["probe_loss"], "tolerance": PROBE_TOLERANCE[made["precision"]]}
        content |= {"dtype": "fp32", "tensors": None, "tied": {}, "origin": {}, "expected": expected}
        content["parameters"] = content["files"][MODEL]["bytes"] // torch.float32.itemsize  # about
        content["checksum"] = checksum(content)  # format 1 has none
    if content["dtype"] not in DTYPES:
        raise ExportError(f"{folder / CONFIG}: dtype {content['dtype']}: not one this program knows; {REMEDY}")
    return content


def _format_of(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # reading it in earnest says what is wrong


def checksum(content: dict[str, Any]) -> str:
    """The hash of what `config.json` says, but for the hash itself."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
