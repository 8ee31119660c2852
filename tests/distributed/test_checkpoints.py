"""Real runs that are killed while they save, find damaged checkpoints, a full disk, other ranks and other stages."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.tokenizer import MixedTokenizer
from tests.checkpoints import write_checkpoint
from tests.launching import error_lines, largest_file, launch, launched, prepare_sums, scalars, started, tidal_here
from tidal_dist.config import load_config
from tidal_dist.export.consolidate import consolidated_weights
from tidal_dist.export.package import model_of_weights
from tidal_dist.export.torch_file import StoredTensor, read_torch_file
from tidal_dist.history.events import read_events
from tidal_dist.history.log import read_log
from tidal_dist.provenance import load_probe
from tidal_dist.training.checkpoint import load_state
from tidal_dist.training.commit import complete_checkpoints, step_of

pytestmark = pytest.mark.slow

OPTIMIZER = "optimizer_state_dict"
# No weight moves: what is exported after the resume is what was saved before it.
STILL = (
    "training={learning_rate: 1.0e-30, steps: %d, batch_rows: 8, warmup_steps: 0, zero_stage: %d, log_every_steps: 1}"
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_sums(tmp_path_factory.mktemp("sums"))


@pytest.fixture(scope="module")
def straight(config: Path) -> Path:
    """Six undisturbed steps on two ranks under ZeRO-3."""
    launched(config)
    return config.parent / "run"


def weights(run: Path, which: str, out: Path) -> dict[str, torch.Tensor]:
    result = tidal_here("export", run, out, "--which", which)
    assert result.returncode == 0, result.stderr.decode()
    return load_file(out / "model.safetensors")


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def steps(run: Path) -> list[int]:
    return [step_of(path) for path in complete_checkpoints(run / "checkpoints")]


def events(run: Path, kind: str) -> list[dict]:
    return [event for event in read_events(run) if event["event"] == kind]


def test_a_run_goes_on_elsewhere(config: Path, straight: Path, tmp_path: Path) -> None:
    """Two ranks under ZeRO-3, then one under ZeRO-2 with the optimizer in host memory, then two under ZeRO-1."""
    run = tmp_path / "run"
    shutil.copytree(straight / "checkpoints" / "step-00000003", run / "checkpoints" / "step-00000003")
    before = weights(straight, "3", tmp_path / "before")
    offload = "deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}}"
    for ranks, stage, step, others in ((1, 2, 4, [offload]), (2, 1, 5, [])):
        launched(config, "--resume", f"run_dir={run}", STILL % (step, stage), *others, ranks=ranks)
        resumed = events(run, "resume")[-1]
        assert (resumed["converted"], resumed["step"], resumed["ranks"]) == (True, step - 1, ranks)
        assert abs(resumed["probe_loss_difference"]) < 1e-5
        assert_equal(weights(run, str(step), tmp_path / f"after-{step}"), before)
        state = load_state(run / "checkpoints" / f"step-{step:08d}")
        assert (state.ranks, state.optimizer_steps, state.layout["zero_optimization"]["stage"]) == (ranks, step, stage)
    hashes = {line.step: line.rolling_hash for line in read_log(straight)}
    assert {line.step: line.rolling_hash for line in read_log(run)} == {s: hashes[s] for s in (0, 3, 4, 5)}
    assert not list((run / "checkpoints").glob(".*"))


def test_a_run_killed_while_it_saves_ends_as_if_nothing_had_been(config: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = run / "checkpoints"
    settings = [f"run_dir={run}", "training.save_every_steps=1", "training.keep_checkpoints=3"]
    with started(config, *settings) as process:
        while len(complete_checkpoints(folder)) < 2 or not list(folder.glob(".step-*.partial")):
            assert process.poll() is None
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
    *older, newest = complete_checkpoints(folder)
    path = newest / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    output = launched(config, "--resume", *settings)
    line = f"{newest.name} skipped: {path.name} is not what was written"
    assert line in output
    (skipped,) = events(run, "skip_checkpoint")
    assert skipped["checkpoint"] == newest.name
    (resumed,) = events(run, "resume")
    assert (resumed["checkpoint"], resumed["converted"], resumed["probe_loss_difference"]) == (older[-1].name, False, 0)
    assert_equal(weights(run, "last", tmp_path / "a"), weights(straight, "last", tmp_path / "b"))
    assert [line for line in read_log(run) if line.step] == [line for line in read_log(straight) if line.step]
    assert steps(run) == [4, 5, 6]
    assert not list(folder.glob(".*"))
    assert read_events(run)[-1]["event"] == "finish"


def test_a_disk_that_refuses_costs_no_checkpoint_that_is_there(config: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight / "checkpoints" / "step-00000003", run / "checkpoints" / "step-00000003")
    with largest_file(250_000):
        result = launch(config, "--resume", f"run_dir={run}", "training.steps=5", "training.save_every_steps=4")
    assert result.returncode == 2, result.stdout[-2000:]
    (error,) = error_lines(result.stdout)
    assert "step-00000005: cannot write the last checkpoint (File too large" in error
    assert "step 4: saving failed, older checkpoints are as they were: File too large" in result.stdout
    assert "Traceback" not in result.stdout
    assert [event["step"] for event in events(run, "save_failed")] == [4, 5]
    assert scalars(run)["checkpoint/failed"] == {4: 1.0, 5: 1.0}
    assert steps(run) == [3]
    assert not list((run / "checkpoints").glob(".*"))


def test_an_export_writes_the_texts_that_validation_wrote(straight: Path, tmp_path: Path) -> None:
    for which, texts in (("6", 2), ("3", 2)):
        result = tidal_here("export", straight, tmp_path / which, "--which", which, "--json")
        report = json.loads(result.stdout)
        assert report["texts"] == texts
    assert "data: corpus | 48 rows" in (tmp_path / "6" / "README.md").read_text()


def test_checkpoints_that_tests_make_are_laid_out_as_real_ones(straight: Path, tmp_path: Path) -> None:
    """Figures of an export are measured on them."""
    real = straight / "checkpoints" / "step-00000006"
    config = load_config(real / "config.yaml")
    tokenizer = MixedTokenizer.load(real / "tokenizer.json", config.segmentation)
    model = model_of_weights(config.model, tokenizer, consolidated_weights(real))
    probe = load_probe(real / "probe.safetensors")
    ours = write_checkpoint(tmp_path / "checkpoints", 6, model, tokenizer, probe, stage=3, ranks=2)
    assert {path.name for path in ours.iterdir()} == {path.name for path in real.iterdir()} - {"texts.json"}
    for path in sorted(real.glob("*.pt")):
        found, truth = (read_torch_file(folder / path.name) for folder in (ours, real))
        for keys in (["param_shapes"], ["module"], [OPTIMIZER, "fp32_flat_groups"], [OPTIMIZER, OPTIMIZER, "state"]):
            if keys[0] in truth:
                assert _outline(found, keys) == _outline(truth, keys)
        # Beside the tensors there are only names and settings.
        assert abs((ours / path.name).stat().st_size - path.stat().st_size) < 4000
    assert_equal(consolidated_weights(ours), consolidated_weights(real))


def _outline(content: Any, keys: list[str]) -> Any:
    """What of a file stands under some keys: types and shapes of tensors."""
    for key in keys:
        content = content[key]
    return _plain(content)


def _plain(value: Any) -> Any:
    if isinstance(value, StoredTensor):
        return value.dtype, value.shape
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
