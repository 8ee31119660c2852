"""The proof that an export is the model that was trained, from the exported folder alone.

It takes little memory: the weights are mapped and given back layer by layer, and rows are passed one at a time.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_pipeline.files import sha256_of
from data_pipeline.layout import NO_DOCUMENT, Slots
from data_pipeline.segmentation import segment
from data_pipeline.stream import Batch
from data_pipeline.tokenizer import FIRST_TOKEN, MixedTokenizer
from tidal_dist.errors import ExportError
from tidal_dist.export import package
from tidal_dist.export.package import REMEDY, Exported, load_export, read_config
from tidal_dist.export.tensor_files import DTYPES, map_tensors
from tidal_dist.export.texts import compare_texts, generate_texts
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.provenance import PROBE_TOLERANCE, StoredText, load_probe, probe_loss, read_texts

_RELEASE_BYTES = 1 << 26  # of weights that were touched since memory was given back
_UNUSUAL = (
    "",
    " ",
    "\r\n\t\x0b\u2028 \u00a0",
    "a\x00b\x7f",
    "naïve Straße e\u0301 \u0041\u030a",
    "👩\u200d🚀👍🏽🏳️\u200d🌈",
    "\u202emirrored\u202c مرحبا שלום",
    "\ufeff\ufffd\uffff\U0010ffff",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ﷽",
    "潮水退去，涨潮了 ３ 米。ภาษาไทย",
    "12 + 34 = 46; -22",
)


@dataclass(frozen=True)
class Proof:
    """What was proven of an export.

    Attributes:
        tensors, parameters: how many there are. probe_loss: nats per label; expected: what the checkpoint stored, or
            for an average the export; tolerance: how far they may be apart, as a share of the larger of 1 and that.
        texts: stored texts that were generated again. near: those of them that differ where two chars are likely to
            equal parts. round_trips: texts that the tokeniser gave back.
    """

    tensors: int
    parameters: int
    probe_loss: float
    expected: float
    tolerance: float
    texts: int
    near: int
    round_trips: int

    def lines(self) -> list[str]:
        """What was found, for people."""
        apart = f"within {self.tolerance:g} of {self.expected:.6f}"
        near = f", {self.near} of them up to a char that rounding decides" if self.near else ""
        texts = f"{self.texts} stored texts generated again{near}" if self.texts else "the checkpoint stored no texts"
        return [
            f"{self.tensors} tensors, {self.parameters:,} parameters: names, shapes and sizes as written",
            f"probe loss {self.probe_loss:.6f}, {apart}",
            texts,
            f"{self.round_trips} texts through the tokeniser and back",
        ]


def verify_export(folder: Path) -> Proof:
    """Check every file of an export by its hash, then prove it anew.

    Raises:
        ExportError: a file is not the one that was written, or the model is not the one that was trained.
    """
    content = read_config(folder)
    if package.checksum(content) != content["checksum"]:
        raise ExportError(f"{folder / package.CONFIG}: its content is not what was written; {REMEDY}")
    package.check_sizes(folder, content["files"])
    for name, recorded in content["files"].items():
        if sha256_of(folder / name) != recorded["sha256"]:
            raise ExportError(f"{folder / name}: its content is not what was written; {REMEDY}")
    return prove(folder)


def prove(folder: Path) -> Proof:
    """Load an export strictly, repeat its probe batch and its texts in the training's precision.

    Raises:
        ExportError: the model is not the one that was trained.
    """
    content = read_config(folder)
    exported = load_export(folder)
    parameters = _check_tensors(folder, content)
    expected = content["expected"]
    probe = load_probe(folder / package.PROBE)
    with frugal(exported):
        loss = _probe_loss(exported.model, probe)
        if not abs(loss - expected["probe_loss"]) <= expected["tolerance"] * max(1.0, abs(expected["probe_loss"])):
            known = f"the probe batch's loss is {loss:.6f}, the checkpoint's was {expected['probe_loss']:.6f}"
            raise ExportError(f"{folder}: {known}")
        texts = read_texts(folder / package.TEXTS, ExportError) if package.TEXTS in content["files"] else []
        precision = max(exported.provenance.precision, content["dtype"], key=lambda name: PROBE_TOLERANCE[name])
        near = compare_texts(exported.model, exported.tokenizer, texts, precision, str(folder))
    round_trips = _check_tokenizer(folder, exported.tokenizer, texts, probe)
    return Proof(
        len(exported.tensors.tensors),
        parameters,
        loss,
        expected["probe_loss"],
        expected["tolerance"],
        len(texts),
        near,
        round_trips,
    )


@contextmanager
def frugal(exported: Exported) -> Iterator[None]:
    """While the model computes in its training's precision, and needs the memory of a few layers."""
    dtype, touched = DTYPES[exported.provenance.precision], 0

    def enter(module: nn.Module, _: Any) -> None:
        kept[module] = [p.data for p in module.parameters()]
        for p in module.parameters():
            if p.dtype != dtype:
                # Generation runs in inference mode, whose tensors no parameter may hold.
                with torch.inference_mode(False):
                    p.data = p.data.to(dtype)

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        nonlocal touched
        for p, data in zip(module.parameters(), kept.pop(module), strict=True):
            p.data = data
            touched += data.nbytes
        if touched > _RELEASE_BYTES:
            exported.tensors.release()
            touched = 0

    kept: dict[nn.Module, list[torch.Tensor]] = {}
    units = [*exported.model.layers, *(m for m in exported.model.children() if not isinstance(m, nn.ModuleList))]
    hooks = [unit.register_forward_pre_hook(enter) for unit in units]
    hooks += [unit.register_forward_hook(leave) for unit in units]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        exported.tensors.release()


def _probe_loss(model: TidalTransformer, batch: Batch) -> float:
    """Nats per label; the rows one after the other and without their padding, which gives the same sum for less."""
    nats = 0.0
    for row in range(len(batch.labels)):
        tokens, chars = _filled(batch.tokens, row), _filled(batch.chars, row)
        one = Batch(tokens, chars, batch.labels[row : row + 1, : chars.ids.shape[1]])
        nats += probe_loss(model, one, "cpu") * max(one.label_count(), 1)
    return nats / max(batch.label_count(), 1)


def _filled(slots: Slots, row: int) -> Slots:
    """One row of slots, without the padding at its end."""
    used = (slots.document[row] != NO_DOCUMENT).nonzero()
    end = int(used.max()) + 1 if len(used) else 1
    return slots.map(lambda a: a[row : row + 1, :end])


def _check_tensors(folder: Path, content: dict[str, Any]) -> int:
    """Compare the files' tensors with what was to be written, and the index with the files; number of elements."""
    dtype, total = DTYPES[content["dtype"]], 0
    shapes, where = {}, {}
    for name in package.weight_files(content):
        for tensor_name, tensor in map_tensors([folder / name]).tensors.items():
            shapes[tensor_name], where[tensor_name] = list(tensor.shape), name
            total += tensor.numel()
            if tensor.dtype != dtype:
                raise ExportError(f"{folder / name}: {tensor_name} is {tensor.dtype}, not {content['dtype']}; {REMEDY}")
    if content["tensors"] is not None and shapes != content["tensors"]:
        wrong = min(n for n in shapes | content["tensors"] if shapes.get(n) != content["tensors"].get(n))
        there, written = (found.get(wrong, "none") for found in (shapes, content["tensors"]))
        raise ExportError(f"{folder}: {wrong} has shape {there}, {written} was written; {REMEDY}")
    if package.INDEX in content["files"]:
        index = json.loads((folder / package.INDEX).read_bytes())
        if index["weight_map"] != where:
            raise ExportError(f"{folder / package.INDEX}: does not say where the weights are; {REMEDY}")
    return total


def _check_tokenizer(folder: Path, tokenizer: MixedTokenizer, texts: Sequence[StoredText], probe: Batch) -> int:
    """Encode and decode unusual texts, the stored ones and those of the probe batch; how many there were."""
    checked = [*_UNUSUAL, *("".join([*text.prompt, *text.blocks]) for text in texts), *_texts_of(probe, tokenizer)]
    for text in checked:
        if "".join(segment(text, tokenizer.segmentation)) != text or tokenizer.decode(tokenizer.encode(text)) != text:
            raise ExportError(f"{folder}: the tokeniser does not give back {text[:40]!r}; {REMEDY}")
    return len(checked)


def _texts_of(batch: Batch, tokenizer: MixedTokenizer) -> Iterator[str]:
    """The texts of a batch's documents, as their tokens tell them."""
    for ids, documents in zip(batch.tokens.ids.tolist(), batch.tokens.document.tolist(), strict=True):
        for document in sorted(set(documents) - {NO_DOCUMENT}):
            own = [i for i, d in zip(ids, documents, strict=True) if d == document and i >= FIRST_TOKEN]
            yield tokenizer.decode(own)


def own_expectations(folder: Path) -> tuple[float, list[StoredText]]:
    """What a model whose weights no checkpoint holds, an average, says of the probe batch and after the prompts.

    Raises:
        ExportError: its loss is not a number.
    """
    exported = load_export(folder)
    with frugal(exported):
        loss = _probe_loss(exported.model, load_probe(folder / package.PROBE))
        if not math.isfinite(loss):
            raise ExportError(f"{folder}: the probe batch's loss is {loss}; export one of the checkpoints instead")
        path = folder / package.TEXTS
        texts = (
            generate_texts(exported.model, exported.tokenizer, read_texts(path, ExportError)) if path.exists() else []
        )
    return loss, texts
