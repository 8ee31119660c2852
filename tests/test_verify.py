"""Every file of a shard folder, damaged in every way: `tidal shards verify` finds it and says which."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import ShardError
from data_pipeline.rows import RowFormat, write_row_plan
from data_pipeline.shards import Manifest
from data_pipeline.storage import Storage
from data_pipeline.verify import verify
from tests.launching import tidal_error, tidal_here


@pytest.fixture
def folder(manifest: Manifest, tmp_path: Path) -> Path:
    """A copy of the tiny shards with two row plans."""
    copy = Path(shutil.copytree(manifest.folder, tmp_path / "shards"))
    write_row_plan(Manifest.load(copy), RowFormat(40, 80, overlap_tokens=4))
    return copy


def faults(folder: Path) -> dict[str, str]:
    return {fault.file: fault.what for fault in verify(Storage(folder))}


def flip(path: Path, at: float, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1 << bit
    path.write_bytes(data)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_sound_folder_has_no_faults(folder: Path) -> None:
    assert faults(folder) == {}
    result = tidal_here("shards", "verify", folder)
    assert result.returncode == 0
    assert b"every file is as it was written" in result.stdout


@pytest.mark.slow
def test_a_flipped_bit_anywhere_is_found_in_its_file(folder: Path) -> None:
    """In every file, at its start, its end and between; that of the manifest's seal is found at the manifest."""
    for path in files_of(folder):
        name, sound = str(path.relative_to(folder)), path.read_bytes()
        for at, bit in ((0.0, 0), (0.31, 7), (0.5, 3), (0.87, 1), (1.0, 0)):
            flip(path, at, bit)
            try:
                found = faults(folder)
            except ShardError as error:  # what cannot be read as a manifest at all
                found = {"manifest.json": str(error)}
            path.write_bytes(sound)
            # A row plan's list that now names another file is found by that name.
            assert name in found or (name.endswith(("plan.json", ".json.sha256")) and found), (name, at, found)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "truncated"),
        (lambda p: p.write_bytes(b""), "truncated: 0 bytes"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "too long"),
        (lambda p: p.unlink(), "missing"),
    ],
)
def test_torn_and_missing_files(folder: Path, damage: Callable[[Path], object], what: str) -> None:
    names = ["train/shard-000000.tar", "train/shard-000000.index.npz", "config.yaml", "tokenizer.json"]
    manifest = Manifest.load(folder)
    first = manifest.shards("train")[0]["name"]
    names[:2] = [f"{first}.tar", f"{first}.index.npz"]
    names.append(f"rows-48x96/{first}.npz")
    for name in names:
        damage(folder / name)
    found = faults(folder)
    assert set(found) == set(names)
    assert all(what in text for text in found.values())


def test_a_foreign_shard_is_found(folder: Path) -> None:
    name = Manifest.load(folder).shards("train")[0]["name"]
    shutil.copy(folder / f"{name}.tar", folder / "train" / "of-another-corpus.tar")
    assert "foreign" in faults(folder)["train/of-another-corpus.tar"]


def test_two_shards_that_changed_places(folder: Path) -> None:
    first, second = (folder / f"{entry['name']}.tar" for entry in Manifest.load(folder).shards("train")[:2])
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1])
    second.write_bytes(data[0])
    assert {f"train/{first.name}", f"train/{second.name}"} == set(faults(folder))


def test_the_documents_of_a_flipped_bit_are_named(folder: Path) -> None:
    entry = Manifest.load(folder).shards("train")[0]
    flip(folder / f"{entry['name']}.tar", 0.01)
    assert "sha256 differs, documents 0..6" in faults(folder)[f"{entry['name']}.tar"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda c: c.update(manifest="0" * 64), "belongs to other shards"),
        (lambda c: c.update(row_tokens=41), "another size"),
        (lambda c: c["shards"]["train"].pop(), "does not list the shards of train"),
        (lambda c: c["shards"]["train"][0].update(rows=1), "rows 1 instead of"),
        (lambda c: c["shards"]["train"][0].update(char_slots=1), "char_slots 1 instead of"),
        (lambda c: c.pop("shards"), "not a row plan"),
    ],
)
def test_a_row_plan_that_is_not_this_one(folder: Path, change: Callable[[dict], object], what: str) -> None:
    path = folder / "rows-40x80-overlap-4" / "plan.json"
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))
    assert what in faults(folder)["rows-40x80-overlap-4/plan.json"]


def test_the_command_names_each_fault(folder: Path, tmp_path: Path) -> None:
    name = Manifest.load(folder).shards("train")[1]["name"]
    flip(folder / f"{name}.tar", 0.5)
    (folder / f"{name}.index.npz").unlink()
    result = tidal_here("shards", "verify", folder)
    assert result.returncode == 1
    lines = result.stdout.decode().splitlines()
    assert [line.split(":")[0] for line in lines] == [f"{name}.index.npz", f"{name}.tar", str(folder)]
    found = json.loads(tidal_here("shards", "verify", folder, "--json").stdout)["faults"]
    assert [fault["file"] for fault in found] == [f"{name}.index.npz", f"{name}.tar"]
    assert "no manifest.json" in tidal_error("shards", "verify", tmp_path / "nowhere")
