"""What `pip install tidal-dist` alone can do: load, generate, verify, without what trains or prepares data."""

import importlib.metadata
import json
import os
import subprocess
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.exporting import write_small_export
from tests.ranks import ROOT

pytestmark = pytest.mark.slow

ABSENT = ("deepspeed", "webdataset", "datatrove", "fastapi", "matplotlib", "tensorboard", "psutil")
USE = """
import importlib, sys
for name in {absent!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    sys.exit(name + " is there")
import torch
from tidal_dist.cli import main
from tidal_dist.export.package import load_export
from tidal_dist.generation.decoder import Decoder
exported = load_export(sys.argv[1])
assert Decoder(exported.model, exported.tokenizer).generate(["12 + 34 ="])[0].blocks
sys.exit(main(["verify", sys.argv[1], "--json"]) or main(["generate", sys.argv[1], "--prompt", "12 +", "--json"]))
"""


def closure(requirements: list[str]) -> set[str]:
    """The distributions that are installed for requirements, and for those that they require."""
    found: set[str] = set()
    todo = [Requirement(text) for text in requirements]
    while todo:
        wanted = todo.pop()
        if (wanted.marker and not wanted.marker.evaluate({"extra": ""})) or wanted.name in found:
            continue
        found.add(wanted.name)
        todo += [Requirement(text) for text in importlib.metadata.requires(wanted.name) or []]
    return found


def link(distribution: str, folder: Path) -> None:
    """Put what a distribution installed into another environment."""
    installed = importlib.metadata.distribution(distribution)
    tops = {file.parts[0] for file in installed.files or [] if file.parts[0] not in ("..", "__pycache__")}
    for name in tops:
        if not (folder / name).exists():
            (folder / name).symlink_to(Path(str(installed.locate_file(name))))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds the project and its base dependencies."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in closure(project["dependencies"]):
        link(name, packages)
    for name in ("tidal_dist", "data_pipeline", "launch"):
        (packages / name).symlink_to(ROOT / name)
    return folder / "bin" / "python"


def test_a_model_is_used_where_nothing_else_is_installed(bare: Path, tmp_path: Path) -> None:
    write_small_export(tmp_path / "export")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    code = USE.format(absent=ABSENT)
    result = subprocess.run(
        [bare, "-c", code, tmp_path / "export"],
        capture_output=True,
        env=environment,
        cwd=tmp_path,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    verified, generated = map(json.loads, result.stdout.splitlines())
    assert verified["probe_loss"] == pytest.approx(verified["expected"])
    assert generated["prompt"] == "12 +"


def test_the_closure_leaves_something_out() -> None:
    found = closure(["torch"])
    assert {"torch", "filelock"} <= found
    assert not found & set(ABSENT)
