"""Training as users start it: the deepspeed launcher, ZeRO-3, two real ranks."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.ordering import Order
from data_pipeline.rows import RowFormat, RowReader
from data_pipeline.shards import Manifest
from data_pipeline.stream import Share, StepDataset
from tests.launching import error_lines, images, launch, launched, prepare_sums, scalars, tidal_here
from tidal_dist.config import load_config
from tidal_dist.model.transformer import TidalTransformer
from tidal_dist.training.loop import learning_rate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_sums(tmp_path_factory.mktemp("sums"))


@pytest.fixture(scope="module")
def trained(config: Path) -> Path:
    """The run of the plain configuration, started as users do."""
    launched(config, "monitor={pictures: true, report: true}", by_deepspeed=True)
    return config.parent / "run"


def run_with(config: Path, name: str, *overrides: str, ranks: int = 2, resume: bool = False) -> Path:
    run = config.parent / name
    launched(config, *(["--resume"] if resume else []), f"run_dir={run}", *overrides, ranks=ranks)
    return run


ONCE = "validation.every_steps=6"  # is quicker where only the steps count


def losses(run: Path) -> list[float]:
    return [value for _, value in sorted(scalars(run)["train/loss"].items())]


def weights(run: Path, out: Path) -> dict[str, torch.Tensor]:
    result = tidal_here("export", run, out, "--which", "last")
    assert result.returncode == 0, result.stderr.decode()
    return load_file(out / "model.safetensors")


def test_run_leaves_what_a_user_expects(trained: Path) -> None:
    found = scalars(trained)
    assert set(found) >= {
        "train/loss",
        "train/learning_rate",
        "train/gradient_norm",
        "speed/tokens_per_second",
        "speed/bytes_per_second",
        "validation/loss",
        "validation/bits_per_byte",
        "validation/exact_match",
        "validation/attention_share",
    }
    assert sorted(found["train/loss"]) == [1, 2, 3, 4, 5, 6]
    assert sorted(found["validation/loss"]) == [3, 6]
    assert losses(trained)[-1] < losses(trained)[0]
    pictures = images(trained)
    assert set(pictures) == {"validation/layout", "validation/attention", "validation/loss_by_char"}
    for by_step in pictures.values():
        assert sorted(by_step) == [3, 6]
        assert all(png.startswith(b"\x89PNG") for png in by_step.values())
    assert pictures["validation/attention"][3] != pictures["validation/attention"][6]
    resolved = (trained / "config.yaml").read_bytes()
    state = json.loads((trained / "checkpoints" / "step-00000006" / "state.json").read_bytes())
    assert (state["provenance"]["step"], state["provenance"]["rows"], state["ranks"]) == (6, 48, 2)
    assert state["provenance"]["run"] == str(trained)
    assert state["provenance"]["config_hash"] == hashlib.sha256(resolved).hexdigest()
    assert json.loads((trained / "checkpoints" / "best.json").read_bytes())["checkpoint"].startswith("step-")
    assert not list((trained / "checkpoints").glob(".*"))
    assert "Finished after 6 of 6 steps" in (trained / "report.html").read_text("utf-8")


def test_zero_3_makes_the_steps_of_plain_pytorch(config: Path, trained: Path) -> None:
    settings = load_config(config)
    manifest = Manifest.load(settings.data.shards)
    tokenizer = manifest.tokenizer()
    row_format = RowFormat(settings.data.row_tokens, settings.data.row_chars)
    reader = RowReader(manifest, "train", tokenizer, row_format, settings.data.seed)
    order = Order(reader.shard_rows, settings.data.lanes, settings.data.seed)
    dataset = StepDataset(reader, order, Share(settings.training.batch_rows, 1, 0, 1), 0)
    torch.manual_seed(settings.training.seed)
    model = TidalTransformer(settings.model, tokenizer.vocab_size, settings.segmentation.max_block_bytes)
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if id(p) in linear], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if id(p) not in linear], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    expected = []
    for step in range(settings.training.steps):
        batch = dataset.step(step).batches[0].to("cpu")
        loss = model(batch.tokens, batch.chars, batch.labels) / batch.label_count()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.training.max_gradient_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings.training, step)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses(trained) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "ranks", "overrides"),
    [
        ("one-rank", 1, []),
        ("accumulated", 2, ["training.accumulation_steps=2"]),
        ("zero-0", 2, ["training.zero_stage=0"]),
        ("zero-1", 2, ["training.zero_stage=1"]),
        ("zero-2", 2, ["training.zero_stage=2"]),
        ("partitioned", 2, ["deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"]),
        (
            "offloaded",
            2,
            ["deepspeed={zero_optimization: {offload_optimizer: {device: cpu}, offload_param: {device: cpu}}}"],
        ),
        (
            "offloaded-accumulated",
            2,
            [
                "training.zero_stage=2",
                "training.accumulation_steps=2",
                "deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}}",
            ],
        ),
        ("workers", 2, ["data.workers=2"]),
    ],
)
def test_loss_does_not_depend_on_how_the_batch_is_divided(
    config: Path, trained: Path, name: str, ranks: int, overrides: list[str]
) -> None:
    run = run_with(config, name, ONCE, *overrides, ranks=ranks)
    assert losses(run) == pytest.approx(losses(trained), rel=1e-4)


def test_bf16_trains_and_its_export_repeats_its_loss(config: Path, trained: Path, tmp_path: Path) -> None:
    run = run_with(config, "bf16", ONCE, "training.precision=bf16")
    assert losses(run) == pytest.approx(losses(trained), rel=0.02)
    assert losses(run) != losses(trained)
    assert weights(run, tmp_path / "export")["norm.weight"].dtype == torch.float32
    assert tidal_here("generate", tmp_path / "export", "--prompt", "1 + 1 =", "--max-bytes", "8").returncode == 0


def test_bf16_trains_where_nothing_is_divided(config: Path, trained: Path) -> None:
    """DeepSpeed makes a first step of its own there, which must not count."""
    run = run_with(config, "bf16-zero-0", ONCE, "training.precision=bf16", "training.zero_stage=0")
    assert losses(run) == pytest.approx(losses(trained), rel=0.02)
    assert losses(run) != losses(trained)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("kept-activations", ["training.activation_checkpointing=false"]),
        (
            "half-of-the-layers",
            ["training.activation_checkpoint_every_layers=2", "training.activation_checkpoints_on_cpu=true"],
        ),
    ],
)
def test_activation_checkpointing_changes_no_digit(
    config: Path, trained: Path, name: str, overrides: list[str]
) -> None:
    assert losses(run_with(config, name, ONCE, *overrides)) == losses(trained)


def test_resumed_run_continues_bit_for_bit(config: Path, tmp_path: Path) -> None:
    overrides = ["model.dropout=0.1", "model.place_shift=3"]
    straight = run_with(config, "straight", *overrides)
    halves = config.parent / "halves"
    shutil.copytree(straight, halves)
    shutil.rmtree(halves / "checkpoints" / "step-00000006")
    partial = halves / "checkpoints" / "step-00000005"
    shutil.copytree(halves / "checkpoints" / "step-00000003", partial)
    (partial / "COMMIT").unlink()  # a checkpoint that was cut off does not exist
    run_with(config, "halves", *overrides, resume=True)
    ours, theirs = weights(halves, tmp_path / "a"), weights(straight, tmp_path / "b")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    states = [json.loads((r / "checkpoints/step-00000006/state.json").read_bytes()) for r in (straight, halves)]
    assert states[0]["provenance"]["rolling_hash"] == states[1]["provenance"]["rolling_hash"]
    assert states[0]["provenance"]["probe_loss"] == states[1]["provenance"]["probe_loss"]


def test_keeps_the_newest_checkpoints_and_the_best(config: Path) -> None:
    run = run_with(config, "keeping", "training.save_every_steps=1", "training.keep_checkpoints=2")
    best = json.loads((run / "checkpoints" / "best.json").read_bytes())["checkpoint"]
    kept = {p.name for p in (run / "checkpoints").glob("step-*")}
    assert kept == {"step-00000005", "step-00000006", best}
    # This run was not to draw.
    assert not images(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "ranks", "expected"),
    [
        (["training.stepz=3"], 1, "training.stepz; did you mean steps?"),
        (["data.shards=/nowhere/shards"], 1, "/nowhere/shards: no manifest.json"),
        (["run_dir=RUN/new", "--resume"], 1, "no complete checkpoint to resume from"),
        ([], 1, "give --resume or another run_dir"),
        (["--resume", "model.width=64"], 2, "step-00000006: holds another model: model.width 32 there, 64 in this run"),
        (["--resume", "data.seed=2"], 2, ": order hash "),
        (["run_dir=RUN/new", "data.lanes=3"], 2, "data.lanes=3 is not a multiple of 2 ranks"),
        (["run_dir=RUN/new", "training.batch_rows=6"], 1, "training.batch_rows=6 is not a multiple of data.lanes=4"),
        (["run_dir=RUN/new", "data.row_chars=4"], 1, "data.row_chars"),
        (["run_dir=RUN/new", "segmentation.max_block_bytes=16"], 1, "another segmentation"),
        (["run_dir=RUN/new", "deepspeed={gradient_clipping: 5.0}"], 1, "deepspeed.gradient_clipping=5.0 contradicts"),
    ],
)
def test_mistakes_end_in_one_line(
    config: Path, trained: Path, tmp_path: Path, arguments: list[str], ranks: int, expected: str
) -> None:
    before = sorted(trained.rglob("*"))
    result = launch(config, *(a.replace("RUN", str(tmp_path)) for a in arguments), ranks=ranks)
    errors = error_lines(result.stdout)
    assert result.returncode == 2, result.stdout[-2000:]
    assert len(errors) == 1, result.stdout[-2000:]
    assert expected in errors[0]
    assert "Traceback" not in result.stdout
    assert sorted(trained.rglob("*")) == before
