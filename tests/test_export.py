"""The exported folder: strict loading, verification, and nothing half-written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.exporting import write_small_export
from tidal_dist.errors import ExportError
from tidal_dist.export.package import load_export
from tidal_dist.export.proof import verify_export


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


def test_a_flipped_bit(tmp_path: Path) -> None:
    write_small_export(tmp_path / "export")
    path = tmp_path / "export" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 16
    path.write_bytes(data)
    with pytest.raises(ExportError, match="content is not what was written"):
        verify_export(tmp_path / "export")


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
