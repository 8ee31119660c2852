"""The exported folder: strict loading, verification, and nothing half-written."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.layout import lay_out
from data_pipeline.pieces import piece_of_blocks
from data_pipeline.stream import batch_of_rows
from data_pipeline.tokenizer import MixedTokenizer
from tests.builders import small_tokenizer
from tests.exporting import write_small_export
from tidal_dist.errors import ExportError
from tidal_dist.export import texts
from tidal_dist.export.package import load_export, stored_tensors
from tidal_dist.export.proof import verify_export
from tidal_dist.export.tensor_files import write_tensors
from tidal_dist.export.texts import compare_texts, generate_texts
from tidal_dist.export.weights import held
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.provenance import StoredText


def edit_config(folder: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads((folder / "config.json").read_bytes())
    edit(content)
    (folder / "config.json").write_text(json.dumps(content))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the weights and record the new file as if it were the written one."""
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")
    size = (folder / "model.safetensors").stat().st_size
    edit_config(folder, lambda c: c["files"]["model.safetensors"].update(bytes=size))


def test_loads_what_was_written(tmp_path: Path) -> None:
    model = write_small_export(tmp_path / "export")
    exported = load_export(tmp_path / "export")
    assert not exported.model.training
    assert exported.model.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(exported.model.state_dict()[n], w) for n, w in model.state_dict().items())
    assert verify_export(tmp_path / "export").probe_loss == pytest.approx(exported.provenance.probe_loss, rel=1e-6)
    assert {p.name for p in (tmp_path / "export").iterdir()} == {
        "model.safetensors",
        "tokenizer.json",
        "probe.safetensors",
        "training.yaml",
        "config.json",
        "README.md",
    }


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "probe.safetensors", "config.json"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    write_small_export(tmp_path / "export")
    (tmp_path / "export" / name).unlink()
    with pytest.raises(ExportError, match=rf"{name}"):
        load_export(tmp_path / "export")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "probe.safetensors", "config.json"])
def test_a_truncated_file(tmp_path: Path, name: str) -> None:
    write_small_export(tmp_path / "export")
    path = tmp_path / "export" / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ExportError, match=rf"{name}.*(torn|cannot read)"):
        load_export(tmp_path / "export")


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose weights lie in several files."""
    out = tmp_path_factory.mktemp("parts") / "export"
    write_small_export(out, max_file_bytes=30_000)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    verify_export(out)
    return out


@pytest.fixture
def own(in_parts: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(in_parts, tmp_path / "export"))


@pytest.mark.parametrize(
    "name",
    [
        "model-00002-of-00003.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "probe.safetensors",
        "training.yaml",
        "README.md",
    ],
)
def test_a_flipped_bit(own: Path, name: str) -> None:
    data = bytearray((own / name).read_bytes())
    data[-5] ^= 16
    (own / name).write_bytes(data)
    with pytest.raises(ExportError, match=f"{name}: its content is not what was written"):
        verify_export(own)


def test_a_changed_description(own: Path) -> None:
    edit_config(own, lambda c: c["provenance"].update(rows=9))
    with pytest.raises(ExportError, match=r"config\.json: its content is not what was written"):
        verify_export(own)


def test_a_missing_part(own: Path) -> None:
    (own / "model-00003-of-00003.safetensors").unlink()
    for check in (load_export, verify_export):
        with pytest.raises(ExportError, match=r"model-00003-of-00003\.safetensors: missing; export"):
            check(own)


def test_a_card_that_people_write_on_does_not_keep_the_model_from_loading(own: Path) -> None:
    (own / "README.md").write_text("mine")
    load_export(own)
    (own / "README.md").unlink()
    load_export(own)
    with pytest.raises(ExportError, match=r"README\.md: missing"):
        verify_export(own)


def test_other_libraries_read_the_parts(in_parts: Path) -> None:
    weights = {name: w for path in in_parts.glob("model-*") for name, w in load_file(path).items()}
    model = load_export(in_parts).model
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], w) for name, w in model.state_dict().items())


def test_loading_takes_no_memory_of_its_own(in_parts: Path) -> None:
    exported = load_export(in_parts)
    stored = exported.tensors.tensors
    assert all(w.data_ptr() == stored[name].data_ptr() for name, w in exported.model.state_dict().items())
    with torch.no_grad():
        exported.model.norm.weight.add_(1)  # a copy of that page, not the file
    assert not torch.equal(load_export(in_parts).model.norm.weight, exported.model.norm.weight)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    """No model of this program ties weights; a checkpoint may all the same."""
    weights = {"a": torch.randn(3), "b": torch.randn(2)}
    tied = replace(held(weights), tied={"c": "a"})
    write_tensors(tmp_path / "model.safetensors", tied, ["a", "b"], torch.float32, lambda _, piece: piece)
    content = {"files": {"model.safetensors": {}}, "tied": tied.tied}
    found = stored_tensors(tmp_path, content).tensors
    assert found["c"].data_ptr() == found["a"].data_ptr()
    with pytest.raises(ExportError, match="c is to be x, which is not there"):
        stored_tensors(tmp_path, content | {"tied": {"c": "x"}})


def test_an_export_of_the_first_format(tmp_path: Path) -> None:
    """Which had one file of weights in float32, no card, no texts and no hash of its description."""
    write_small_export(tmp_path / "export")
    kept = ("model", "segmentation", "provenance", "files")

    def as_the_first(content: dict) -> None:
        for key in content.keys() - kept:
            del content[key]
        del content["files"]["README.md"]
        content["format"] = 1

    edit_config(tmp_path / "export", as_the_first)
    assert verify_export(tmp_path / "export").tensors == len(load_export(tmp_path / "export").model.state_dict())


def test_a_text_may_differ_where_rounding_decides(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    model = write_small_export(tmp_path / "export")
    (truth,) = generate_texts(model, tokenizer, [StoredText(["12", " +"], [], "length", 12, None)])
    assert truth.blocks
    assert compare_texts(model, tokenizer, [truth], "fp32", "here") == 0
    first = truth.blocks[0].encode()[-1]  # the char that is chosen first
    other = replace(truth, blocks=[truth.blocks[0][:-1] + ("a" if first != ord("a") else "b"), *truth.blocks[1:]])
    with pytest.raises(ExportError, match="here: after '12 \\+' it writes"):
        compare_texts(model, tokenizer, [other], "fp32", "here")
    apart = apart_of(model, tokenizer, other, truth)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(texts.MARGIN, "fp32", apart * 1.001)
        assert compare_texts(model, tokenizer, [other], "fp32", "here") == 1
        patch.setitem(texts.MARGIN, "fp32", apart * 0.999)
        with pytest.raises(ExportError, match="rounding explains"):
            compare_texts(model, tokenizer, [other], "fp32", "here")
    shorter = replace(truth, blocks=truth.blocks[:-1], finish="length")
    with pytest.raises(ExportError, match="rounding explains"):
        compare_texts(model, tokenizer, [shorter], "fp32", "here")


def apart_of(model: TidalTransformer, tokenizer: MixedTokenizer, stored: StoredText, found: StoredText) -> float:
    """How far the logits of the chars that a block begins with are apart, after the prompt alone."""
    piece = piece_of_blocks([*found.prompt, found.blocks[0]], tokenizer, len(found.prompt))
    batch = batch_of_rows([lay_out(piece, tokenizer.byte_lengths, model.config.char_positions)])
    logits = model(batch.tokens, batch.chars)[0, 0]
    return float((logits[stored.blocks[0].encode()[-1]] - logits[found.blocks[0].encode()[-1]]).abs().detach())


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda w: w.pop("norm.weight"), "Missing key.*norm.weight"),
        (lambda w: w.update(extra=torch.zeros(2)), "Unexpected key.*extra"),
        (lambda w: w.update({"norm.weight": torch.zeros(3)}), "size mismatch.*norm.weight"),
    ],
)
def test_weights_are_loaded_strictly(tmp_path: Path, edit: Callable, expected: str) -> None:
    write_small_export(tmp_path / "export")
    edit_weights(tmp_path / "export", edit)
    with pytest.raises(ExportError, match=expected):
        load_export(tmp_path / "export")


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda c: c.update(format=99), "format 99, this program reads up to 2; install a newer"),
        (lambda c: c.pop("model"), "lacks model"),
        (lambda c: c["model"].update(wings=2), "not a configuration this program knows"),
        (lambda c: c["provenance"].update(tokenizer_hash="0" * 64), "its tokeniser is not the one of the training"),
        (lambda c: c["segmentation"].update(max_unspaced_chars=3), "its segmentation is not the one of the training"),
    ],
)
def test_a_foreign_configuration(tmp_path: Path, edit: Callable, expected: str) -> None:
    write_small_export(tmp_path / "export")
    edit_config(tmp_path / "export", edit)
    with pytest.raises(ExportError, match=expected):
        load_export(tmp_path / "export")


def test_an_export_that_does_not_repeat_the_loss_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the probe batch's loss is"):
        write_small_export(tmp_path / "export", probe_loss_error=0.01)
    assert list(tmp_path.glob("*export*")) == []


def test_an_export_is_not_overwritten(tmp_path: Path) -> None:
    write_small_export(tmp_path / "export")
    with pytest.raises(ExportError, match="already there"):
        write_small_export(tmp_path / "export")
    verify_export(tmp_path / "export")
