"""Files of torch.save, read without running them: lazily, and strictly."""

import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import LossScaler, fragment_address
from tidal_dist.errors import CheckpointError
from tidal_dist.export.torch_file import StoredTensor, Stub, read_torch_file


class Runs:
    """Whose unpickling makes a folder, where it is run."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_what_was_saved_is_found_without_its_classes(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    saved = {
        "float": base.view(4, 6),
        "part": base[6:10],
        "bf16": torch.randn(5).bfloat16(),
        "turned": base.view(4, 6).T,
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 3),
        "other": [OrderedDict(a=(1, "x")), torch.Size([2, 3]), torch.bfloat16, LossScaler()],
        "address": fragment_address(3, 5),
    }
    torch.save(saved, tmp_path / "file.pt")
    found = read_torch_file(tmp_path / "file.pt")
    assert list(found) == list(saved)
    for name in ("float", "part", "bf16", "parameter", "scalar", "empty"):
        tensor = found[name]
        assert isinstance(tensor, StoredTensor)
        assert torch.equal(tensor.read(0, tensor.numel).view(tensor.shape), saved[name])  # type: ignore[arg-type]
    assert found["float"].read(7, 5).tolist() == [7, 8, 9, 10, 11]
    assert found["float"].storage == found["part"].storage != found["bf16"].storage
    assert found["other"][:3] == [{"a": (1, "x")}, (2, 3), torch.bfloat16]
    assert isinstance(found["other"][3], Stub)
    assert found["address"].state == {"numel": 3, "start": 5}
    for name, first, count in (("turned", 0, 2), ("float", 20, 5), ("float", -1, 1)):
        with pytest.raises(CheckpointError, match="not laid out as DeepSpeed"):
            found[name].read(first, count)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"a": Runs(tmp_path / "made")}, tmp_path / "file.pt")
    assert isinstance(read_torch_file(tmp_path / "file.pt")["a"], Stub)
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "made").exists()  # so it would have been


@pytest.mark.parametrize("kept", [0, 10, 700, -1, -400])
def test_a_torn_file(tmp_path: Path, kept: int) -> None:
    torch.save({"a": torch.arange(300)}, tmp_path / "whole.pt")
    (tmp_path / "file.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"file\.pt: .*use another checkpoint"):
        read_torch_file(tmp_path / "file.pt")


def rewritten(source: Path, out: Path, **options: Any) -> None:
    """The same archive written anew: compressed, or with another pickle."""
    pickle = options.pop("pickle", None)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w", **options) as new:
        for name in old.namelist():
            new.writestr(name, pickle if pickle and name.endswith("data.pkl") else old.read(name))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"compression": zipfile.ZIP_DEFLATED}, "a storage is compressed"),
        ({"pickle": b"no pickle"}, "torn, or not a file that torch.save wrote"),
    ],
)
def test_a_foreign_file(tmp_path: Path, options: dict[str, Any], expected: str) -> None:
    torch.save({"a": torch.arange(300)}, tmp_path / "whole.pt")
    rewritten(tmp_path / "whole.pt", tmp_path / "file.pt", **options)
    with pytest.raises(CheckpointError, match=expected):
        read_torch_file(tmp_path / "file.pt")


def test_a_file_that_is_not_there_and_one_that_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("text")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("a.txt", "a")
    for name, expected in (
        ("none", "No such file"),
        ("text", "not a zip file"),
        ("other", "not a file that torch.save"),
    ):
        with pytest.raises(CheckpointError, match=expected):
            read_torch_file(tmp_path / f"{name}.pt")
