"""Checkpoints of every stage and number of ranks, streamed into one folder; what is damaged is refused in a line."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.builders import small_model, small_tokenizer
from tests.checkpoints import write_small_run
from tests.exporting import write_small_export
from tests.launching import largest_file, tidal_error, tidal_here
from tests.ranks import ROOT, environment
from tidal_dist.errors import CheckpointError, ExportError
from tidal_dist.export import weights as reading
from tidal_dist.export.consolidate import Choice, consolidated_weights, export
from tidal_dist.export.package import load_export
from tidal_dist.export.weights import averaged, held
from tidal_dist.provenance import read_texts
from tidal_dist.training import checkpoint as ckpt
from tidal_dist.training.commit import COMMIT


def weights_of(step: int = 1, **settings: Any) -> dict[str, torch.Tensor]:
    return small_model(small_tokenizer(), seed=step, dtype=torch.float32, **settings).state_dict()


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "run"
    write_small_run(folder, steps=(1, 2, 3))
    return folder


@pytest.fixture
def own(run: Path, tmp_path: Path) -> Path:
    """A copy of the run's last checkpoint that a test may damage."""
    return Path(shutil.copytree(run / "checkpoints" / "step-00000003", tmp_path / "step-00000003"))


@pytest.mark.parametrize(("stage", "ranks"), [(0, 2), (1, 1), (1, 3), (2, 5), (3, 1), (3, 3), (3, 17)])
def test_every_stage_and_number_of_ranks(
    tmp_path: Path, stage: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_PIECE", 100)  # so that there are many pieces
    assert_equal(consolidated_weights(write_small_run(tmp_path / "run", stage=stage, ranks=ranks)), weights_of())


def test_buffers_that_are_cut_into_several(own: Path) -> None:
    """DeepSpeed cuts the buffers of stage 3 where they get long; a parameter may go over from one to the next."""
    state = ckpt.load_state(own)
    for path in own.glob("*optim_states.pt"):
        content = torch.load(path, weights_only=False)
        flat = torch.cat(content["optimizer_state_dict"]["fp32_flat_groups"])
        content["optimizer_state_dict"]["fp32_flat_groups"] = [part.clone() for part in flat.split(1000)]
        torch.save(content, path)
    found = reading.stored_weights(own, state)
    assert_equal({name: found.whole(name) for name in found.shapes}, weights_of(3))


def test_a_universal_checkpoint(own: Path, tmp_path: Path) -> None:
    """What DeepSpeed's converter makes: a file of each parameter, flat and padded where it comes from stage 3."""
    universal = tmp_path / "universal"
    for number, (name, weight) in enumerate(weights_of(3).items()):
        (universal / "zero" / name).mkdir(parents=True)
        flat = torch.cat([weight.reshape(-1), torch.zeros(3)])
        torch.save(flat if number % 2 else {"param": weight, "cat_dim": 0}, universal / "zero" / name / "fp32.pt")
    assert "universal checkpoint without state.json; copy state.json" in tidal_error(
        "export", universal, tmp_path / "out"
    )
    for name in (ckpt.STATE, ckpt.CONFIG, ckpt.TOKENIZER, ckpt.PROBE, ckpt.TEXTS):
        shutil.copy(own / name, universal / name)
    export(universal, tmp_path / "out")
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), weights_of(3))
    torch.save(torch.zeros_like(weights_of()["norm.weight"]), universal / "zero" / "norm.weight" / "fp32.pt")
    with pytest.raises(CheckpointError, match=r"norm\.weight is not what the training had"):
        export(universal, tmp_path / "other")


def test_the_command_line(run: Path, tmp_path: Path) -> None:
    result = tidal_here("export", run, tmp_path / "out", "--json", "--dtype", "bf16", "--max-shard-size", "20KB")
    assert result.returncode == 0, result.stderr.decode()
    report = json.loads(result.stdout)
    assert (report["step"], report["dtype"], report["texts"]) == (3, "bf16", 2)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())
    files = sorted(path.name for path in (tmp_path / "out").glob("model-*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    found = {name: w for file in files for name, w in load_file(tmp_path / "out" / file).items()}
    assert_equal(found, {name: w.bfloat16() for name, w in weights_of(3).items()})
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in found.values())
    assert all(found[name].data_ptr() for name in index["weight_map"])
    verified = tidal_here("verify", tmp_path / "out")
    assert verified.stdout.decode().splitlines()[0] == "good"


def test_the_card_says_what_it_is(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", "2")
    card = (tmp_path / "out" / "README.md").read_text()
    state = ckpt.load_state(run / "checkpoints" / "step-00000002")
    made = state.provenance
    hashes = (made.manifest_hash, made.tokenizer_hash, made.segmentation_hash, made.config_hash, made.rolling_hash)
    for text in (*hashes, "step-00000002, chosen as 2", "16 rows, 0.2500 epochs", "validation/bits_per_byte | 2.5"):
        assert text in card
    assert "2, of which 1 were on a disk and are hashed; sha256 of `corpus.sha256`" in card
    assert f"their list: `{'3' * 64}`" in card
    assert f"| corpus file `data/a file.jsonl` | `{'4' * 64}` |" in card
    assert "2 stored texts generated again" in card
    assert f"{made.probe_loss:.6f}" in card
    files = json.loads((tmp_path / "out" / "config.json").read_bytes())["files"]
    assert all(file["sha256"] in card for name, file in files.items() if name != "README.md")


def test_the_average_of_a_run(run: Path, tmp_path: Path) -> None:
    result = tidal_here("export", run, tmp_path / "out", "--which", "ema", "--ema-decay", "0.5")
    assert result.returncode == 0, result.stderr.decode()
    one, two, three = (weights_of(step) for step in (1, 2, 3))
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in found.items():
        torch.testing.assert_close(weight, (one[name] + 2 * two[name] + 4 * three[name]) / 7)
    assert "steps 1, 2, 3; decay 0.5" in (tmp_path / "out" / "README.md").read_text()
    assert tidal_here("verify", tmp_path / "out").returncode == 0
    content = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert content["expected"]["probe_loss"] != content["provenance"]["probe_loss"]
    texts = read_texts(tmp_path / "out" / "texts.json", CheckpointError)
    assert texts != read_texts(run / "checkpoints" / "step-00000003" / "texts.json", CheckpointError)
    message = tidal_error("export", run / "checkpoints" / "step-00000003", tmp_path / "other", "--which", "ema")
    assert "one checkpoint, which has no average" in message


def test_an_average_over_other_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of other numbers of ranks come in other pieces."""
    monkeypatch.setattr(reading, "_PIECE", 7)
    value = torch.randn(5, 9)
    cut = reading.Weights({"w": (5, 9)}, lambda _: iter(value.reshape(-1).split(4)))
    mean = averaged([cut, held({"w": value + 3})], 1.0).whole("w")
    torch.testing.assert_close(mean, value + 1.5)
    with pytest.raises(CheckpointError, match="different models"):
        averaged([cut, held({"w": value.T})], 1.0)


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    message = tidal_error("export", tmp_path / "run", tmp_path / "out")
    assert "neither a checkpoint nor a run with a complete one" in message
    assert "no checkpoint of step 9; there are 1" in tidal_error(
        "export", write_small_run(tmp_path / "other").parents[1], tmp_path / "out", "--which", "9"
    )


def test_a_missing_part_of_a_rank(own: Path, tmp_path: Path) -> None:
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (own / name).unlink()
    assert f"{name} cannot be read (No such file or directory)" in tidal_error("export", own, tmp_path / "out")
    with pytest.raises(CheckpointError, match=f"no {name}, the part of rank 1"):
        reading.stored_weights(own, ckpt.load_state(own))
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("name", ["zero_pp_rank_0_mp_rank_00_optim_states.pt", "probe.safetensors", "state.json"])
def test_a_flipped_byte(own: Path, tmp_path: Path, name: str) -> None:
    data = bytearray((own / name).read_bytes())
    data[-len(data) // 3] ^= 1
    (own / name).write_bytes(data)
    assert f"{name}" in (message := tidal_error("export", own, tmp_path / "out"))
    assert "is not what was written" in message or "cannot read" in message


def test_weights_of_another_checkpoint(own: Path, tmp_path: Path) -> None:
    """Files that are whole, hashes and all, but hold other weights than the training wrote down."""
    content = json.loads((own / ckpt.STATE).read_bytes())
    content["parameters"]["layers.1.out.weight"]["digest"][0] += 1
    (own / ckpt.STATE).write_text(json.dumps(content))
    (own / COMMIT).write_text(json.dumps({"format": 1, "step": 3, "files": []}))
    assert "layers.1.out.weight is not what the training had" in tidal_error("export", own, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_file_of_another_layout(own: Path) -> None:
    path = own / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": {"zero_stage": 3}}, path)
    with pytest.raises(CheckpointError, match=r"not as DeepSpeed writes a checkpoint \(no 'fp32_flat_groups'\)"):
        reading.stored_weights(own, ckpt.load_state(own))


def test_a_text_that_the_model_does_not_write(own: Path, tmp_path: Path) -> None:
    content = json.loads((own / "texts.json").read_bytes())
    block = content["texts"][0]["blocks"][0]
    content["texts"][0]["blocks"][0] = block[:-1] + ("x" if block[-1] != "x" else "y")
    (own / "texts.json").write_text(json.dumps(content))
    (own / COMMIT).write_text(json.dumps({"format": 1, "step": 3, "files": []}))
    message = tidal_error("export", own, tmp_path / "out")
    assert "after '12 + 34 =' it writes" in message
    assert "rounding explains 0.001" in message


def test_a_checkpoint_without_texts(own: Path, tmp_path: Path) -> None:
    (own / "texts.json").unlink()
    (own / COMMIT).write_text(json.dumps({"format": 1, "step": 3, "files": []}))
    result = tidal_here("export", own, tmp_path / "out")
    assert "the checkpoint stored no texts" in result.stdout.decode()
    assert tidal_here("verify", tmp_path / "out").returncode == 0


def test_values_beyond_fp16(tmp_path: Path) -> None:
    model = small_model(small_tokenizer(), dtype=torch.float32)
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    weights["norm.weight"][3] = 70000.0
    with pytest.raises(ExportError, match=r"norm\.weight: holds 70000, beyond what fp16 can hold"):
        write_small_export(tmp_path / "out", weights=held(weights), dtype="fp16")
    assert not list(tmp_path.iterdir())


def test_a_full_disk(own: Path, tmp_path: Path) -> None:
    with largest_file(20_000):
        message = tidal_error("export", own, tmp_path / "out")
    assert "cannot write (File too large); free space" in message
    assert not list(tmp_path.glob("*out*"))


def test_too_little_space_is_seen_before(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    assert "the export needs 0.0 GB, 0.0 GB are free" in tidal_error("export", own, tmp_path / "out")


@pytest.mark.parametrize("size", ["0", "5 apples", "-1GB", ""])
def test_a_size_that_is_none(run: Path, tmp_path: Path, size: str) -> None:
    assert "no size" in tidal_error("export", run, tmp_path / "out", f"--max-shard-size={size}")


@pytest.mark.slow
def test_a_kill_leaves_nothing_that_counts(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys, os, signal, tidal_dist.export.write as write\n"
        "write.prove = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from tidal_dist.cli import main; main(['export', *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", code, str(run), str(tmp_path / "out")]
    assert subprocess.run(command, cwd=ROOT, env=environment(), timeout=120).returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == [".out.partial"]
    assert tidal_here("export", run, tmp_path / "out").returncode == 0
    assert os.listdir(tmp_path) == ["out"]


def test_loading_takes_the_type_that_is_asked_for(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", Choice(dtype="bf16"))
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        model = load_export(tmp_path / "out", dtype).model
        assert {p.dtype for p in model.parameters()} == {expected}
        assert not any(p.is_meta for p in model.parameters())
    assert math.prod(model.embedding.weight.shape) == weights_of()["embedding.weight"].numel()
