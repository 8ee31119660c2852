"""Steps that must not be made, on two real ranks: what they do to the run, and a replay that repeats every bit."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from data_pipeline.layout import IGNORED
from data_pipeline.ledger import Ledger
from data_pipeline.ordering import roll
from data_pipeline.rows import RowReader, row_format_of
from tests.launching import error_lines, launch, prepare_sums, scalars, tidal_here
from tests.planted import chars_as_text
from tidal_dist.history.events import read_events
from tidal_dist.history.explain import explain
from tidal_dist.history.log import ROLLING_HASH, read_log
from tidal_dist.history.past import open_run

pytestmark = pytest.mark.slow

STEPS, BATCH, SAVED_EVERY = 20, 8, 5
# Steps, counted from 1, with what one of their rows does; after steps 14 and 15 the run goes back to step 10.
PLANTED = {4: "nan", 12: "spike", 14: "gradient", 15: "nan"}
TRAINING = [
    f"training.steps={STEPS}",
    f"training.save_every_steps={SAVED_EVERY}",
    "validation.every_steps=1000",
    "validation.prompts=2",
    "validation.max_bytes=4",
    "guard.window_steps=8",
    "guard.max_skipped_in_a_row=2",
]
STAGE_0 = ["training.zero_stage=0", "training.accumulation_steps=2"]


class Finished(NamedTuple):
    """A run that has ended: its folder, exit code and output."""

    run: Path
    code: int
    output: str


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_sums(tmp_path_factory.mktemp("sums"), 3000)


def planted_row(step: int) -> int:
    """The row of a step that does harm: one of rank 1."""
    return (step - 1) * BATCH + 3


def chars_of(config: Path, g: int) -> str:
    """The chars of a row of the run that a configuration describes."""
    folder = config.parent / "plain"
    if not folder.exists():
        folder.mkdir()
        shutil.copy(config, folder / "config.yaml")
    past = open_run(folder)
    reader = RowReader(past.manifest, "train", past.manifest.tokenizer(), row_format_of(past.config.data), 1)
    _, chars, labels = reader.row(past.order.locate(g), g)
    assert (labels != IGNORED).any()
    return chars_as_text(torch.from_numpy(chars.ids))


def train(
    config: Path, name: str, planted: dict[int, str], *overrides: str, monkeypatch: pytest.MonkeyPatch
) -> Finished:
    run = config.parent / name
    monkeypatch.setenv("PLANTED", json.dumps({chars_of(config, planted_row(s)): what for s, what in planted.items()}))
    process = launch(config, f"run_dir={run}", *TRAINING, *overrides, script="tests/planted.py")
    return Finished(run, process.returncode, process.stdout)


def saved_tensors(checkpoint: Path) -> list[torch.Tensor]:
    """Weights in fp32, moments and step counters as DeepSpeed saved them, of all ranks."""
    found: list[torch.Tensor] = []

    def collect(value: Any) -> None:
        if torch.is_tensor(value):
            found.append(value)
        elif isinstance(value, dict):
            for part in value.values():
                collect(part)
        elif isinstance(value, list | tuple):
            for part in value:
                collect(part)

    files = sorted(checkpoint.glob("*optim_states.pt"))
    assert len(files) == 2
    for file in files:
        collect(torch.load(file, weights_only=False)["optimizer_state_dict"])
    assert sum(tensor.numel() for tensor in found) > 10_000
    return found


def assert_same_weights(first: Path, second: Path, step: int) -> None:
    ours, theirs = (saved_tensors(run / "checkpoints" / f"step-{step:08d}") for run in (first, second))
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) and bool(torch.isfinite(a).all()) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def spoilt(config: Path) -> Finished:
    """ZeRO-3 in bf16, with NaN, a spike, and bad steps in a row."""
    with pytest.MonkeyPatch.context() as patch:
        return train(config, "spoilt", PLANTED, "training.precision=bf16", monkeypatch=patch)


def test_bad_steps_are_left_out_and_named(spoilt: Finished) -> None:
    assert spoilt.code == 0, spoilt.output[-3000:]
    events = [e for e in read_events(spoilt.run) if e["event"] in ("bad_step", "rollback")]
    assert [(e["event"], e["step"]) for e in events] == [
        ("bad_step", 4),
        ("bad_step", 12),
        ("bad_step", 14),
        ("bad_step", 15),
        ("rollback", 15),
    ]
    loss, spike, gradient, in_a_row, rollback = events
    past = open_run(spoilt.run)
    for event in (loss, spike, in_a_row):
        row = event["named"][0]
        assert row["row"] == planted_row(event["step"])
        (explained,) = [r for r in explain(past, event["step"])["rows"] if r["g"] == row["row"]]
        documents = [
            f"{explained['shard']} document {p['document']} ({p['file']}:{p['line']})" for p in explained["pieces"]
        ]
        assert row["documents"] == documents
        assert documents
    assert (loss["why"], loss["loss"], loss["named"][0]["nats_per_label"]) == ("the loss is nan", "nan", "nan")
    assert len(loss["named"]) == 1
    assert "above" in spike["why"]
    assert spike["gradient_norm"] > 100
    assert (gradient["why"], gradient["gradient_norm"]) == ("the gradient norm is nan", "nan")
    assert 0 < gradient["loss"] < 10
    assert (rollback["checkpoint"], rollback["rows"]) == ("step-00000010", [10 * BATCH, 15 * BATCH])
    assert f"step 4: the loss is nan; rows {3 * BATCH}..{4 * BATCH - 1} are left out" in spoilt.output
    assert f"row {planted_row(4)} (nan nats per label): train/" in spoilt.output


def test_what_was_left_out_is_recorded_and_told(spoilt: Finished) -> None:
    record = json.loads((spoilt.run / "quarantine.json").read_bytes())["rows"]
    assert [(r["from_row"], r["to_row"], r["rollbacks"]) for r in record] == [
        (3 * BATCH, 4 * BATCH, 0),
        (10 * BATCH, 15 * BATCH, 1),
    ]
    past, log = open_run(spoilt.run), read_log(spoilt.run)
    assert [line.step for line in log] == list(range(STEPS + 1))
    assert log[-1].rolling_hash == roll(past.start, past.order, range(STEPS * BATCH))
    shown = scalars(spoilt.run)
    made = [step for step in range(1, STEPS + 1) if step != 4 and not 10 < step <= 15]
    assert sorted(shown["train/loss"]) == made
    assert shown["data/empty_rows"][STEPS] == sum(use.quarantined for use in Ledger(past.order).at(STEPS * BATCH))
    assert shown["data/empty_rows"][STEPS] == 6 * BATCH
    text = tidal_here("explain", "--run", spoilt.run, "--step", "12").stdout.decode()
    assert "left empty: 2 bad steps in a row, the last one step 15: the loss is nan; back to step-00000010" in text
    assert "corpus.jsonl:" in text  # what the rows held can be read still
    provenance = json.loads((spoilt.run / "checkpoints/step-00000020/state.json").read_bytes())["provenance"]
    assert provenance["quarantine"] == {f"rows {3 * BATCH}": 4 * BATCH, f"rows {10 * BATCH}": 15 * BATCH}
    assert provenance["rolling_hash"] == log[-1].rolling_hash


def test_a_replay_with_the_record_repeats_every_bit(config: Path, spoilt: Finished) -> None:
    """From the first step, by the training that users start."""
    run = config.parent / "replay"
    run.mkdir()
    shutil.copy(spoilt.run / "quarantine.json", run)
    process = launch(config, f"run_dir={run}", *TRAINING, "training.precision=bf16")
    assert process.returncode == 0, process.stdout[-3000:]
    assert not [event for event in read_events(run) if event["event"] in ("bad_step", "rollback")]
    assert_same_weights(run, spoilt.run, STEPS)
    assert (run / ROLLING_HASH).read_bytes() == (spoilt.run / ROLLING_HASH).read_bytes()
    assert scalars(run)["train/loss"] == scalars(spoilt.run)["train/loss"]
    assert (run / "quarantine.json").read_bytes() == (spoilt.run / "quarantine.json").read_bytes()
    assert tidal_here("audit", run, spoilt.run).returncode == 0


@pytest.fixture(scope="module")
def ended(config: Path) -> Finished:
    """Stage 0 in fp32, which DeepSpeed does not look after at all, with gradient accumulation."""
    planted = {7: "gradient", 8: "nan", 11: "nan", 12: "gradient", 13: "nan"}
    with pytest.MonkeyPatch.context() as patch:
        return train(config, "ended", planted, *STAGE_0, "guard.max_rollbacks=1", monkeypatch=patch)


def test_a_run_that_went_back_often_enough_ends_with_a_report(ended: Finished) -> None:
    assert ended.code == 2, ended.output[-3000:]
    (line,) = error_lines(ended.output)
    assert "2 bad steps in a row, the last one step 12: the gradient norm is nan" in line
    assert "the run went back once already (guard.max_rollbacks=1)" in line
    assert "Traceback" not in ended.output
    report = json.loads((ended.run / "guard.json").read_bytes())
    assert report["step"] == 12
    assert [(event["event"], event["step"]) for event in report["events"]] == [
        ("bad_step", 7),
        ("bad_step", 8),
        ("rollback", 8),
        ("bad_step", 11),
        ("bad_step", 12),
    ]
    assert report["events"][1]["named"][0]["row"] == planted_row(8)
    assert report["try"]
    names = sorted(path.name for path in (ended.run / "checkpoints").glob("step-*"))
    assert names == ["step-00000005", "step-00000010"]


def test_what_is_to_be_done_follows_from_the_record(config: Path, ended: Finished) -> None:
    """A run that ended, or was killed, before it went back, goes back when it comes to the rows that are left out."""
    resumed = launch(config, "--resume", f"run_dir={ended.run}", *TRAINING, *STAGE_0, "guard.max_rollbacks=2")
    assert resumed.returncode == 0, resumed.stdout[-3000:]
    (rollback,) = [event for event in read_events(ended.run) if event["event"] == "rollback"][1:]
    assert (rollback["step"], rollback["checkpoint"]) == (12, "step-00000005")
    (left_out,) = json.loads((ended.run / "quarantine.json").read_bytes())["rows"]
    assert (left_out["from_row"], left_out["to_row"], left_out["rollbacks"]) == (5 * BATCH, 12 * BATCH, 2)
    past, log = open_run(ended.run), read_log(ended.run)
    assert [line.step for line in log] == list(range(STEPS + 1))
    assert log[-1].rolling_hash == roll(past.start, past.order, range(STEPS * BATCH))
    last = ended.run / "checkpoints" / f"step-{STEPS:08d}"
    weights = torch.load(last / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert all(bool(torch.isfinite(weight).all()) for weight in weights.values())


def test_the_first_bad_step_may_end_a_run(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 in fp32."""
    stopped = train(config, "stopped", {6: "gradient"}, "guard.on_bad_step=stop", monkeypatch=monkeypatch)
    assert stopped.code == 2, stopped.output[-3000:]
    (line,) = error_lines(stopped.output)
    assert "step 6: the gradient norm is nan, and guard.on_bad_step=stop" in line
    assert str(stopped.run / "guard.json") in line
    assert [path.name for path in (stopped.run / "checkpoints").glob("step-*")] == ["step-00000005"]
    assert not (stopped.run / "quarantine.json").exists()
    assert json.loads((stopped.run / "guard.json").read_bytes())["events"][0]["named"]
